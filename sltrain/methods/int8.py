"""Dense weights in 8-bit codes, a byte an entry (Q-GaLore, Zhang et al., arXiv 2407.08296, section 3.4).

    W = s (code - z)      s and z for each 256 entries

Each update decodes a W, moves it by any optimizer of one tensor and rounds it back to codes at random, so that updates
below a step count on average (affine.py, layers/kinds/int8.py, optim/rounding.py). With `optimizer=q_galore` it is the
paper's method; gradients are dense, so that per_layer_update=true belongs to it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Method, check_above_zero

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("int8")
@dataclass
class Int8(Method):
    """Options of method=int8."""

    gain: float = 1.0  # standard deviation of the projections' start over model.initializer_range

    def check(self) -> None:
        check_above_zero(gain=self.gain)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.int8 import Int8Linear

        return Int8Linear(**like)

    def against_ema(self) -> str | None:
        return "holds W in codes, which cannot be averaged"
