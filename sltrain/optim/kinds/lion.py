"""optimizer=lion: the sign of an interpolated momentum (Chen et al., arXiv 2302.06675, algorithm 2).

    direction = sign(b1 m + (1 - b1) g)        then   m <- b2 m + (1 - b2) g

One moment instead of two. Every entry moves by the learning rate, so lr is usually 3 to 10 times smaller than Adam's.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import Rule, check_betas

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("lion")
@dataclass
class Lion(Rule):
    """Options of optimizer=lion."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # b1, b2

    locality: ClassVar[str] = "element"
    copies_on_cpu: ClassVar[int] = 2
    copies_on_cuda: ClassVar[int] = 2

    def check(self) -> None:
        check_betas(self.betas)

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        return {"momentum": weight.new_zeros(weight.shape)}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        momentum = state["momentum"]
        mixed = momentum.float().lerp(grad, 1 - self.betas[0]).sign_()
        momentum.lerp_(grad.to(momentum.dtype), 1 - self.betas[1])
        return mixed
