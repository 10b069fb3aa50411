"""Dense training, the baseline of the other methods: every projection stays an nn.Linear.

For a fair comparison, products are computed on aligned sides (5461 in LLaMA 1B is not), as those of factored layers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Method, check_above_zero, replace_each

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("full")
@dataclass
class Full(Method):
    """Options of method=full."""

    gain: float = 1.0  # standard deviation of the projections' start over model.initializer_range

    def check(self) -> None:
        check_above_zero(gain=self.gain)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from sltrain.layers.aligned import AlignedLinear

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            return AlignedLinear.of(linear, self.gain)

        return replace_each(model, chosen, make)
