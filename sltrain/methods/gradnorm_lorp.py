"""GradNormLoRP: a low-rank update of a frozen matrix whose rows are normalised (Huang et al., arXiv 2412.19616).

    W = m V / |V|,  V = W0 + (alpha / rank) B A     row by row; W0 frozen at its random start; m, A, B trained

The method's second half projects the gradients of the factors to fewer dimensions. That is `optimizer=galore` here,
with `optimizer.rank` below `rank`: it takes A and B, and m goes to `optimizer.others`.

The authors' optimizer for pretraining has no A and B: it holds every matrix dense, as V and m, and projects the
gradient of V by GaLore, so that V is as large as W. It also leaves in what of the gradient only stretches V, and sets m
to |V| before each update, so that what m learned is lost. Here the layer is as the formula says, with its exact
gradient, and the projection stays an optimizer's, which other methods share.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import (
    METHODS,
    Method,
    check_above_zero,
    check_frozen,
    check_ranks,
    frozen_settings,
    replace_each,
    resolve,
)

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("gradnorm_lorp")
@dataclass
class GradNormLoRP(Method):
    """Options of method=gradnorm_lorp."""

    rank: int = MISSING  # inner size of B A
    alpha: float = MISSING  # the product is scaled by alpha / rank
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    frozen_dtype: str = "auto"  # of W0: float32, bfloat16, or auto, that of the other weights

    def check(self) -> None:
        check_ranks("gradnorm_lorp", self.rank, self.rank_overrides)
        check_above_zero(alpha=self.alpha)
        check_frozen(self.frozen_dtype)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from sltrain.layers.kinds.gradnorm_lorp import GradNormLoRPLinear

        std = getattr(getattr(model, "config", None), "initializer_range", 0.02)

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            rank = resolve(self.rank, self.rank_overrides, name)
            sides = linear.in_features, linear.out_features
            own = like | frozen_settings(self.frozen_dtype)
            return GradNormLoRPLinear(*sides, rank, self.alpha, **own, init_std=std)

        return replace_each(model, chosen, make, {"rank_overrides": self.rank_overrides})
