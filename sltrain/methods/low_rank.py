"""The low-rank baseline: every projection is (alpha / rank) B A, nothing else (Kamalakara et al., arXiv 2209.13569)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Ranked, check_above_zero, check_one_of
from sltrain.methods.restarts import Restarts

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("low_rank")
@dataclass
class LowRank(Ranked, Restarts):
    """Options of method=low_rank, beside those of restarts."""

    alpha: float = MISSING  # the product is scaled by alpha / rank
    start: str = "spectral"  # spectral: nearest to a dense start; uniform, xavier: see layers/factors.py
    gain: float = 1.0  # start=spectral: that dense start's standard deviation over model.initializer_range

    def check(self) -> None:
        super().check()
        check_above_zero(alpha=self.alpha, gain=self.gain)
        check_one_of(("spectral", "uniform", "xavier"), start=self.start)
        if self.start != "spectral" and self.gain != 1:
            raise ValueError(f"method.gain={self.gain:g} is read by method.start=spectral only; drop one of the two")

    def against_spectral(self) -> str | None:
        own = self.start != "spectral"
        return f"method.start={self.start} is a start of its own; drop it" if own else None

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers import LowRankLinear

        return LowRankLinear(rank=self.rank_of(name), alpha=self.alpha, start=self.start, **like)
