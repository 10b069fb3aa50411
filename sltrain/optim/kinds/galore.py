"""optimizer=galore: Adam in the subspace of the gradient's largest singular vectors (Zhao et al., arXiv 2403.03507,
algorithm 2). projected.py has the notation.

    P   the first `rank` singular vectors of G, on its shorter side
    direction = scale c P N        (N P^T where out >= in)

`svd=randomized` finds P by a randomized range finder with two power iterations (Halko et al., arXiv 0909.4061), which
does not depend on the size of the whole decomposition. It works as well on A and B, where `optimizer.rank` is below
theirs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.projected import Projected
from sltrain.optim.kinds.rule import check_finite

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("galore")
@dataclass
class GaLore(Projected):
    """Options of optimizer=galore."""

    scale: float = 0.25
    svd: str = "exact"  # or randomized

    def check(self) -> None:
        super().check()
        check_finite(scale=self.scale)
        if self.svd not in ("exact", "randomized"):
            raise ValueError(f"optimizer.svd={self.svd}: choose one of exact, randomized")

    def new_basis(self, grad: "Tensor", number: int) -> "Tensor":
        from sltrain.optim.basis import leading_directions, sketched_directions

        if self.svd == "exact":
            return leading_directions(grad, self.rank)
        return sketched_directions(grad, self.rank, number)

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        adapted = self.adam(self.project(grad, state), state)
        return self.scale * self.correction(state["step"]) * self.back(adapted, state)
