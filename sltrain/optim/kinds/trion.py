"""optimizer=trion: Muon in the subspace of the cosine vectors that are strongest in the momentum (Modoranu et al.,
arXiv 2505.17967, algorithm Trion); AdamW for the rest.

    M <- M + g;   S = M Q;   R = the `rank` columns of S with the largest L1 norm          (or rows, shorter side)
    M <- M - (1 - b) R Q_r^T         only what is used is forgotten, as in Dion (arXiv 2504.05295)
    direction = scale NS(R) Q_r^T    scale as in muon.py

Newton-Schulz runs on R, of `rank` columns. One moment of the size of the weight is kept.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.dct_adamw import CosineRule
from sltrain.optim.kinds.muon import check_scale, size_of_update
from sltrain.optim.kinds.rule import check_share

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("trion")
@dataclass
class Trion(CosineRule):
    """Options of optimizer=trion."""

    momentum: float = 0.95  # b
    scale: str = "match_rms"  # or original

    def check(self) -> None:
        super().check()
        check_share(momentum=self.momentum)
        check_scale(self.scale)

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        return {"momentum": weight.new_zeros(weight.shape)}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        from sltrain.optim.cosine import strongest, transform, vectors
        from sltrain.optim.orthogonal import newton_schulz

        is_tall = grad.shape[0] >= grad.shape[1]
        momentum = state["momentum"].add_(grad)
        products = transform(momentum.float())
        numbers = strongest(products, is_tall, self.rank)
        projected = products.index_select(1 if is_tall else 0, numbers)
        basis = vectors(min(grad.shape), numbers)
        used = projected @ basis.t() if is_tall else basis @ projected
        momentum.sub_(used, alpha=1 - self.momentum)
        orthogonal = newton_schulz(projected)
        return size_of_update(self.scale, *grad.shape) * (orthogonal @ basis.t() if is_tall else basis @ orthogonal)
