"""CoLA: every projection is B act(A x), a low-rank product with an activation in the middle (arXiv 2502.10940).

`recompute` is CoLA-M of the same paper: of a decoder layer the residual streams and the narrow h = A x of its seven
projections are kept, 2 d + 7 r numbers a position, and what is wide, attention included, is computed again in backward.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import (
    ACTIVATIONS,
    METHODS,
    Method,
    check_above_zero,
    check_one_of,
    check_ranks,
    replace_each,
    resolve,
)

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("cola")
@dataclass
class CoLA(Method):
    """Options of method=cola."""

    rank: int = MISSING  # inner size of B A
    activation: str = "silu"  # between A and B: silu (the paper), gelu, relu, or none for W = B A
    gain: float = 1.0  # of the start of B A; the authors' is 1, which is large for a narrow model
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    recompute: bool = False  # CoLA-M: keep A x of each projection, compute what is wide again in backward

    def check(self) -> None:
        check_ranks("cola", self.rank, self.rank_overrides)
        check_one_of(ACTIVATIONS, activation=self.activation)
        check_above_zero(gain=self.gain)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from sltrain.layers import CoLALinear

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            rank = resolve(self.rank, self.rank_overrides, name)
            sides = linear.in_features, linear.out_features
            return CoLALinear(*sides, rank, self.activation, **like, recompute=self.recompute, gain=self.gain)

        return replace_each(model, chosen, make, {"rank_overrides": self.rank_overrides})
