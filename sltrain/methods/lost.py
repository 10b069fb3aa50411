"""LOST: every projection is gamma B A x + (1 - gamma) V x[columns], both from the singular values of one dense start
(arXiv 2508.02668)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import ACTIVATIONS, METHODS, Ranked, check_above_zero, check_at_least, check_one_of

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("lost")
@dataclass
class LOST(Ranked):
    """Options of method=lost."""

    sparsity: float = MISSING  # fraction of the columns that are trained whole
    gamma: float = 0.5  # share of B A in y; the columns have the rest
    activation: str = "none"  # between A and B: none, or silu, gelu, relu; then there is no W to merge
    complement: int | None = None  # singular triplets after the rank that choose the columns; None: all
    gain: float = 1.0  # the dense start's standard deviation over model.initializer_range

    def check(self) -> None:
        super().check()
        check_one_of(ACTIVATIONS, activation=self.activation)
        check_at_least(1, complement=self.complement)
        check_above_zero(gain=self.gain)
        if not 0 < self.gamma < 1:
            raise ValueError(f"method.gamma={self.gamma:g}: must be above 0 and below 1, the share of B A in y")
        if not 0 < self.sparsity < 1:
            raise ValueError(
                f"sparsity={self.sparsity:g}: method=lost needs a fraction of the columns above 0 and below 1;"
                " without columns it is method=low_rank"
            )

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.lost import LOSTLinear

        own: dict[str, Any] = {"gamma": self.gamma, "activation": self.activation, "complement": self.complement}
        return LOSTLinear(rank=self.rank_of(name), sparsity=self.sparsity, **own, **like)
