"""The low-rank baseline: every projection is (alpha / rank) B A, nothing else (Kamalakara et al., arXiv 2209.13569)."""

from collections.abc import Callable

from torch import nn

from sltrain.layers.convert import replace_linears
from sltrain.layers.linear import LowRankLinear
from sltrain.methods.settings import MethodSettings, chosen_names


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Put a LowRankLinear in place of each chosen linear, on its device and in its dtype; return their names.

    The sparsity and its overrides belong to the model's recipe and are not used. Raises ValueError for a rank a layer
    cannot have, for a pattern that fits nothing, and if no linear was chosen.
    """
    settings.check_patterns(chosen_names(model, should_replace))

    def make(name: str, linear: nn.Linear) -> nn.Module:
        rank, _ = settings.resolve(name)
        try:
            return LowRankLinear(
                linear.in_features,
                linear.out_features,
                rank,
                settings.alpha,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return replace_linears(model, should_replace, make)
