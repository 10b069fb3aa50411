"""optimizer=scale: gradients normalized row by row, and a momentum for the head alone (SCALE, Glentis et al., arXiv
2506.16659, algorithm 1).

    projections, A, B   g / rms of each row: of the gradient of one output
    embedding           g / rms of each column: of one feature over the vocabulary
    head                the same as projections, of m <- b m + (1 - b) g
    values of S         g / rms of the tensor; the paper has none
    norms               AdamW

All steps have entries of about 1, so Adam's learning rates fit. The head's momentum is the only state of size.
The paper writes W (in, out) and says column; here it is (out, in).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.optim.kinds.rule import Rule, check_share
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("scale")
@dataclass
class Scale(Rule):
    """Options of optimizer=scale."""

    momentum: float = 0.9  # of the head's gradient

    copies_on_cpu: ClassVar[int] = 2
    copies_on_cuda: ClassVar[int] = 2

    def check(self) -> None:
        check_share(momentum=self.momentum)

    def takes(self, parameter: ParamInfo) -> bool:
        return parameter.role in ("projection", "factor") and len(parameter.shape) == 2 and parameter.numel > 0

    def rest(self) -> OptimizerConfig:
        head = Normalized("scale head", "head", dim=1, momentum=self.momentum)
        return Normalized("scale embedding", "embedding", dim=0, next=Normalized("scale values", "values", next=head))

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        return normalized(grad, 1)


@dataclass
class Normalized(Rule):
    """The same for the parameters of one role, with `momentum` of their average; `next` updates all others."""

    role: str = ""
    dim: int | None = None
    momentum: float = 0.0
    next: OptimizerConfig | None = None

    copies_on_cpu: ClassVar[int] = 2
    copies_on_cuda: ClassVar[int] = 2

    def takes(self, parameter: ParamInfo) -> bool:
        return parameter.role == self.role and parameter.numel > 0

    def rest(self) -> OptimizerConfig:
        return self.next or super().rest()

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        return {"momentum": weight.new_zeros(weight.shape)} if self.momentum else {}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        if self.momentum:
            kept = state["momentum"]
            grad = kept.lerp_(grad.to(kept.dtype), 1 - self.momentum).float()
        return normalized(grad, self.dim)


def normalized(grad: "Tensor", dim: int | None) -> "Tensor":
    """The gradient over its root mean square along `dim`, or over that of all its entries."""
    squares = grad.square()
    mean = squares.mean() if dim is None else squares.mean(dim, keepdim=True)
    return grad / mean.sqrt_().clamp_min_(1e-8)
