"""DLR: every projection is a low-rank product and a fixed residual of its inner numbers, which folds into B
(arXiv 2606.28932)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import ACTIVATIONS, METHODS, Ranked, check_above_zero, check_one_of, check_residual

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("dlr")
@dataclass
class DLR(Ranked):
    """Options of method=dlr."""

    residual: float = 1.0  # the paper's alpha: strength of the residual; 0: none
    activation: str = "none"  # between A and B: none, or silu, gelu, relu; then there is no W to merge
    gain: float = 1.0  # of the start of B A; the authors' is 1, which is large for a narrow model
    recompute: bool = False  # keep A x of each projection, compute what is wide again in backward (CoLA-M)

    def check(self) -> None:
        super().check()
        check_one_of(ACTIVATIONS, activation=self.activation)
        check_above_zero(gain=self.gain)
        check_residual(self.residual)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.dlr import DLRLinear

        own: dict[str, Any] = {"activation": self.activation, "recompute": self.recompute, "gain": self.gain}
        return DLRLinear(rank=self.rank_of(name), residual=self.residual, **own, **like)
