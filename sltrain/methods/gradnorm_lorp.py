"""GradNormLoRP: a low-rank update of a frozen matrix whose rows are normalised (Huang et al., arXiv 2412.19616).

    W = m V / |V|,  V = W0 + (alpha / rank) B A     row by row; W0 frozen at its random start; m, A, B trained

The method's second half projects the gradients of the factors to fewer dimensions. That is `optimizer=galore` here,
with `optimizer.rank` below `rank`: it takes A and B, and m goes to `optimizer.others`.

The authors' optimizer for pretraining has no A and B: it holds every matrix dense, as V and m, and projects the
gradient of V by GaLore, so that V is as large as W. It also leaves in what of the gradient only stretches V, and sets m
to |V| before each update, so that what m learned is lost. Here the layer is as the formula says, with its exact
gradient, and the projection stays an optimizer's, which other methods share.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Ranked, check_above_zero, check_frozen, frozen_settings

if TYPE_CHECKING:
    from torch import nn


@METHODS.register("gradnorm_lorp")
@dataclass
class GradNormLoRP(Ranked):
    """Options of method=gradnorm_lorp."""

    alpha: float = MISSING  # the product is scaled by alpha / rank
    frozen_dtype: str = "auto"  # of W0: float32, bfloat16, or auto, that of the other weights

    def check(self) -> None:
        super().check()
        check_above_zero(alpha=self.alpha)
        check_frozen(self.frozen_dtype)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.gradnorm_lorp import GradNormLoRPLinear

        frozen = frozen_settings(self.frozen_dtype)
        return GradNormLoRPLinear(rank=self.rank_of(name), alpha=self.alpha, **frozen, **like)
