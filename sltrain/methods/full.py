"""Dense training, the baseline of the other methods: every projection stays an nn.Linear.

For a fair comparison, products are computed on aligned sides (5461 in LLaMA 1B is not), as those of factored layers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Method, check_above_zero

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("full")
@dataclass
class Full(Method):
    """Options of method=full."""

    gain: float = 1.0  # standard deviation of the projections' start over model.initializer_range

    def check(self) -> None:
        check_above_zero(gain=self.gain)

    def against_spectral(self) -> str | None:
        return None

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.aligned import AlignedLinear

        return AlignedLinear.of(linear, self.gain)
