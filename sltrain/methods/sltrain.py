"""SLTrain: every projection is (alpha / rank) B A + S, S sparse on a fixed random support (Han et al., arXiv
2406.02214)."""

from collections.abc import Callable

from torch import nn

from sltrain.layers.convert import replace_linears
from sltrain.layers.linear import SLTrainLinear
from sltrain.methods.settings import MethodSettings, chosen_names


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Put an SLTrainLinear in place of each chosen linear, on its device and in its dtype; return their names.

    Raises ValueError for a rank or sparsity a layer cannot have, for a pattern that fits nothing, and if no linear was
    chosen.
    """
    settings.check_patterns(chosen_names(model, should_replace))

    def make(name: str, linear: nn.Linear) -> nn.Module:
        rank, sparsity = settings.resolve(name)
        try:
            return SLTrainLinear(
                linear.in_features,
                linear.out_features,
                rank,
                sparsity,
                settings.alpha,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return replace_linears(model, should_replace, make)
