"""SLTrain: every projection is (alpha / rank) B A + S, S sparse on a fixed random support (arXiv 2406.02214)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, check_above_zero, check_at_least, check_residual, resolve
from sltrain.methods.regrow import Regrowth
from sltrain.methods.restarts import Restarts

if TYPE_CHECKING:
    from torch import nn

SUPPORTS = ("uniform", "stratified", "block", "column", "slice", "rolled")  # kinds of layers/support/
CHOICES = (*SUPPORTS, "topk")


@METHODS.register("sltrain")
@dataclass
class SLTrain(Restarts, Regrowth):
    """Options of method=sltrain, beside those of restarts and of an S that moves. Of several overrides whose pattern
    fits a layer, the last wins."""

    rank: int = MISSING  # inner size of B A; 0: S alone
    alpha: float = MISSING  # the low-rank product is scaled by alpha / rank
    sparsity: float = MISSING  # the paper's delta: fraction of S that is trained (0.03 = 3 %); 0: B A alone
    support: str = MISSING  # entries of S: uniform (the paper), stratified, block, column, slice, rolled or topk
    support_from: str | None = None  # support=topk: the run or export whose weights choose the positions of S
    block_size: int | None = None  # support=block: side of a block; None: the largest that gives the sparsity
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    sparsity_overrides: dict[str, float] = field(default_factory=dict)  # module-name pattern -> sparsity
    residual: float = 0.0  # strength of the residual of method=dlr, 1 in its paper, beside B A and S; 0: none

    def check(self) -> None:
        super().check()
        self._check_support()
        check_at_least(0, rank=self.rank)
        check_at_least(1, block_size=self.block_size)
        check_above_zero(alpha=self.alpha)
        check_residual(self.residual)
        if self.residual and self.rank == 0 and not self.rank_overrides:
            raise ValueError(
                f"method.residual={self.residual:g} repeats the numbers of A x, and with rank=0 there are none;"
                " set rank above 0, or drop it"
            )
        for pattern, rank in self.rank_overrides.items():
            if rank < 0:
                raise ValueError(f"rank_overrides: {pattern} has rank {rank}; it must be at least 0")
        sparsities = {"sparsity": self.sparsity, **self.sparsity_overrides}
        for name, sparsity in sparsities.items():
            if not 0 <= sparsity < 1:
                raise ValueError(
                    f"{name}={sparsity}: must be at least 0 and below 1;"
                    " it is the fraction of S that is trained (0.03 = 3 %)"
                )
        if self.rank == 0 and self.sparsity == 0 and not (self.rank_overrides or self.sparsity_overrides):
            raise ValueError("rank=0 and sparsity=0 leave no weights; set one of them above 0")
        for name, sparsity in sparsities.items():
            if sparsity == 0 and self.support not in ("uniform", "stratified", "topk"):
                raise ValueError(
                    f"support={self.support} with {name}=0 has nothing to train;"
                    " set sparsity above 0, or support=uniform for B A alone"
                )

    def _check_support(self) -> None:
        if self.support not in CHOICES:
            raise ValueError(f"support={self.support}: choose one of {', '.join(CHOICES)}")
        if self.support == "topk" and not self.support_from:
            raise ValueError(
                "support=topk chooses the positions of S by trained weights: add support_from=RUN, a run's folder or"
                " one of its checkpoints, or choose another support"
            )
        if self.support_from is not None and self.support != "topk":
            raise ValueError(
                f"support_from={self.support_from} is for support=topk, and support is {self.support};"
                " add support=topk, or drop support_from"
            )
        if self.regrow_every and self.sparsity == 0 and not self.sparsity_overrides:
            raise ValueError(
                f"method.regrow_every={self.regrow_every} moves entries of S, and sparsity=0 leaves none; set sparsity"
                " above 0, or drop it"
            )
        if self.regrow_every and self.support not in ("uniform", "topk"):
            raise ValueError(
                f"method.regrow_every={self.regrow_every} moves single entries, and those of support={self.support} lie"
                " in a pattern; set support=uniform, or drop it"
            )
        if self.block_size is not None and self.support != "block":
            raise ValueError(
                f"block_size={self.block_size} is for support=block, and support is {self.support};"
                " add support=block, or drop block_size"
            )

    def against_spectral(self) -> str | None:
        return f"it has no rule for method.residual={self.residual:g}; set it to 0" if self.residual else None

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers import SLTrainLinear

        rank = resolve(self.rank, self.rank_overrides, name)
        sparsity = resolve(self.sparsity, self.sparsity_overrides, name)
        kind = "uniform" if self.support == "topk" else self.support  # building/support_from.py puts other positions in
        own: dict[str, Any] = {"support": kind, "block_size": self.block_size, "residual": self.residual}
        return SLTrainLinear(rank=rank, sparsity=sparsity, alpha=self.alpha, **own, **like)
