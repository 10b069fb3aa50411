"""The low-rank baseline: every projection is (alpha / rank) B A, nothing else (Kamalakara et al., arXiv 2209.13569)."""

from collections.abc import Callable

from torch import nn

from sltrain.layers import LowRankLinear
from sltrain.methods.settings import LayerSettings, MethodSettings, replace_each


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Put a LowRankLinear in place of each chosen linear, on its device and in its dtype; return their names.

    The sparsity and its overrides belong to the model's recipe and are not used. Raises ValueError for a rank a layer
    cannot have, for a pattern that fits nothing, and if no linear was chosen.
    """

    def make(linear: nn.Linear, layer: LayerSettings) -> nn.Module:
        return LowRankLinear(linear.in_features, linear.out_features, layer.rank, settings.alpha, **layer.like_linear)

    return replace_each(model, settings, should_replace, make)
