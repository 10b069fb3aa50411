"""optimizer=polargrad: the polar factor of the momentum times its nuclear norm (Lau et al., arXiv 2505.21799, algorithm
PolarGradM, momentum first); AdamW for the rest.

    m <- b m + (1 - b) g;   U = polar factor of m by QDWH (optim/orthogonal.py);   direction = <m, U> U

<m, U> is the nuclear norm of m: unlike Muon's, the step goes to zero with the gradient. It is large where gradients
are, so learning rates are not Adam's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import MatrixRule, check_share

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("polargrad")
@dataclass
class PolarGrad(MatrixRule):
    """Options of optimizer=polargrad."""

    momentum: float = 0.95

    copies_on_cpu: ClassVar[int] = 11
    copies_on_cuda: ClassVar[int] = 11

    def check(self) -> None:
        super().check()
        check_share(momentum=self.momentum)

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        return {"momentum": weight.new_zeros(weight.shape)}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        from sltrain.optim.orthogonal import qdwh

        kept = state["momentum"]
        momentum = kept.lerp_(grad.to(kept.dtype), 1 - self.momentum).float()
        polar = qdwh(momentum)
        return (momentum * polar).sum() * polar
