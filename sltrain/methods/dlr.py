"""DLR: every projection is a low-rank product and a fixed residual of its inner numbers, which folds into B
(arXiv 2606.28932)."""

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
    check_residual,
    replace_each,
    resolve,
)

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("dlr")
@dataclass
class DLR(Method):
    """Options of method=dlr."""

    rank: int = MISSING  # inner size of B A
    residual: float = 1.0  # the paper's alpha: strength of the residual; 0: none
    activation: str = "none"  # between A and B: none, or silu, gelu, relu; then there is no W to merge
    gain: float = 1.0  # of the start of B A; the authors' is 1, which is large for a narrow model
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    recompute: bool = False  # keep A x of each projection, compute what is wide again in backward (CoLA-M)

    def check(self) -> None:
        check_ranks("dlr", self.rank, self.rank_overrides)
        check_one_of(ACTIVATIONS, activation=self.activation)
        check_above_zero(gain=self.gain)
        check_residual(self.residual)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from sltrain.layers.kinds.dlr import DLRLinear

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            rank = resolve(self.rank, self.rank_overrides, name)
            sides = linear.in_features, linear.out_features
            return DLRLinear(
                *sides, rank, self.residual, self.activation, **like, recompute=self.recompute, gain=self.gain
            )

        return replace_each(model, chosen, make, {"rank_overrides": self.rank_overrides})
