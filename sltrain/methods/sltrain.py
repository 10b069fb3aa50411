"""SLTrain: every projection is (alpha / rank) B A + S, S sparse on a fixed random support (arXiv 2406.02214)."""

from collections.abc import Callable

from torch import nn

from sltrain.layers import SLTrainLinear
from sltrain.methods.settings import LayerSettings, MethodSettings, replace_each


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Put an SLTrainLinear in place of each chosen linear, on its device and in its dtype; return their names.

    Raises ValueError for a rank, sparsity or block size a layer cannot have, for a pattern that fits nothing, and if
    no linear was chosen.
    """

    def make(linear: nn.Linear, layer: LayerSettings) -> nn.Module:
        return SLTrainLinear(
            linear.in_features,
            linear.out_features,
            layer.rank,
            layer.sparsity,
            settings.alpha,
            **layer.like_linear,
            support=settings.support,
            block_size=settings.block_size,
        )

    return replace_each(model, settings, should_replace, make)
