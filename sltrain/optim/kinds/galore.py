"""optimizer=galore: Adam in the subspace of the gradient's largest singular vectors (Zhao et al., arXiv 2403.03507,
algorithm 2). projected.py has the notation.

    P   the first `rank` singular vectors of G, on its shorter side
    direction = scale c P N        (N P^T where out >= in)

`svd=randomized` finds P by a randomized range finder with two power iterations (Halko et al., arXiv 0909.4061), which
does not depend on the size of the whole decomposition. It works as well on A and B, where `optimizer.rank` is below
theirs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.projected import Projected
from sltrain.optim.kinds.rule import check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from sltrain.parameters import ParamInfo


@OPTIMIZERS.register("galore")
@dataclass
class GaLore(Projected):
    """Options of optimizer=galore."""

    scale: float = 0.25
    svd: str = "exact"  # or randomized

    copies_on_cpu: ClassVar[int] = 2  # of the gradient, while a direction is made of R

    def check(self) -> None:
        super().check()
        check_finite(scale=self.scale)
        if self.svd not in ("exact", "randomized"):
            raise ValueError(f"optimizer.svd={self.svd}: choose one of exact, randomized")

    def step_bytes(self, parameter: "ParamInfo", device_type: str, rounding: bool) -> int:
        """On a CPU: of a decomposition, which copies the gradient and makes singular vectors of both sides, or of a
        direction and what has the shape of R. What LAPACK itself takes is not in it."""
        others = super().step_bytes(parameter, device_type, rounding)
        if device_type != "cpu":
            return others
        short, long = sorted(parameter.shape)
        decomposition = 2 * short * long + short * short
        direction = self.copies_on_cpu * short * long + self.rank * (short + 2 * long)
        in_float32 = short * long if parameter.element_size < 4 else 0  # a copy of the gradient
        return max(others, 4 * (max(decomposition, direction) + in_float32))

    def new_basis(self, grad: "Tensor", number: int) -> "Tensor":
        from sltrain.optim.basis import leading_directions, sketched_directions

        if self.svd == "exact":
            return leading_directions(grad, self.rank)
        return sketched_directions(grad, self.rank, number)

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        adapted = self.adam(self.project(grad, state), state)
        return self.scale * self.correction(state["step"]) * self.back(adapted, state)
