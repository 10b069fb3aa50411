"""CoLA: every projection is B act(A x), a low-rank product with an activation in the middle (arXiv 2502.10940).

`recompute` is CoLA-M of the same paper: of a decoder layer the residual streams and the narrow h = A x of its seven
projections are kept, 2 d + 7 r numbers a position, and what is wide, attention included, is computed again in backward.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import ACTIVATIONS, METHODS, Ranked, check_above_zero, check_one_of

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("cola")
@dataclass
class CoLA(Ranked):
    """Options of method=cola."""

    activation: str = "silu"  # between A and B: silu (the paper), gelu, relu, or none for W = B A
    gain: float = 1.0  # of the start of B A; the authors' is 1, which is large for a narrow model
    recompute: bool = False  # CoLA-M: keep A x of each projection, compute what is wide again in backward

    def check(self) -> None:
        super().check()
        check_one_of(ACTIVATIONS, activation=self.activation)
        check_above_zero(gain=self.gain)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers import CoLALinear

        own: dict[str, Any] = {"activation": self.activation, "recompute": self.recompute, "gain": self.gain}
        return CoLALinear(rank=self.rank_of(name), **own, **like)
