"""optimizer=sgd: stochastic gradient descent, with momentum if asked for (Sutskever et al., 2013, as torch.optim.SGD).

    m <- momentum m + g;   direction = m, with nesterov g + momentum m

Without momentum it keeps nothing. It is here as the floor that other state-free rules are compared to.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import Rule, check_share

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("sgd")
@dataclass
class SGD(Rule):
    """Options of optimizer=sgd."""

    momentum: float = 0.0
    nesterov: bool = False

    locality: ClassVar[str] = "element"
    copies_on_cpu: ClassVar[int] = 1
    copies_on_cuda: ClassVar[int] = 1

    def check(self) -> None:
        check_share(momentum=self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov=true needs a momentum; set optimizer.momentum=0.9, or drop it")

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        return {"momentum": weight.new_zeros(weight.shape)} if self.momentum else {}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        if not self.momentum:
            return grad
        momentum = state["momentum"].mul_(self.momentum).add_(grad)
        return grad + self.momentum * momentum.float() if self.nesterov else momentum.float()
