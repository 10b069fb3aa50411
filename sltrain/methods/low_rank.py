"""The low-rank baseline: every projection is (alpha / rank) B A, nothing else (Kamalakara et al., arXiv 2209.13569)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, check_above_zero, check_one_of, check_ranks, replace_each, resolve
from sltrain.methods.restarts import Restarts

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("low_rank")
@dataclass
class LowRank(Restarts):
    """Options of method=low_rank, beside those of restarts."""

    rank: int = MISSING  # inner size of B A
    alpha: float = MISSING  # the product is scaled by alpha / rank
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    start: str = "spectral"  # spectral: nearest to a dense start; uniform, xavier: see layers/factors.py
    gain: float = 1.0  # start=spectral: that dense start's standard deviation over model.initializer_range

    def check(self) -> None:
        super().check()
        check_above_zero(alpha=self.alpha, gain=self.gain)
        check_one_of(("spectral", "uniform", "xavier"), start=self.start)
        if self.start != "spectral" and self.gain != 1:
            raise ValueError(f"method.gain={self.gain:g} is read by method.start=spectral only; drop one of the two")
        check_ranks("low_rank", self.rank, self.rank_overrides)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from sltrain.layers import LowRankLinear

        std = self.gain * getattr(getattr(model, "config", None), "initializer_range", 0.02)

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            rank = resolve(self.rank, self.rank_overrides, name)
            sides = linear.in_features, linear.out_features
            return LowRankLinear(*sides, rank, self.alpha, **like, start=self.start, init_std=std)

        return replace_each(model, chosen, make, {"rank_overrides": self.rank_overrides})
