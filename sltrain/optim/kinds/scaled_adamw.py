"""optimizer=scaled_adamw: Adam on gradients of A and B that the other factor preconditions (Zhang & Pilanci, arXiv
2402.02347, algorithm 1); AdamW for the rest.

    g_A <- P(B^T B) g_A,   g_B <- g_B P(A A^T)        P(M) = t (M + d t I)^-1, t the mean of M's eigenvalues

The r x r solves make a step independent of how B A is split between its factors. In the paper t is 1. While B grows
from zero its preconditioned gradients would then shrink a millionfold, and Adam's second moments of A would remember
the first ones for thousands of updates; t keeps their size, and P(0) is the identity.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import PairRule, check_betas
from sltrain.optim.moments import averages, new_averages

if TYPE_CHECKING:
    from torch import Tensor

    from sltrain.optim.rule import Factor


@OPTIMIZERS.register("scaled_adamw")
@dataclass
class ScaledAdamW(PairRule):
    """Options of optimizer=scaled_adamw."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    eps: float = 1e-8
    damping: float = 1e-6  # d

    copies_on_cpu: ClassVar[int] = 10
    copies_on_cuda: ClassVar[int] = 10

    def check(self) -> None:
        super().check()
        check_betas(self.betas)
        if not self.damping > 0:
            raise ValueError(f"optimizer.damping={self.damping}: must be above 0 (1e-6 is usual)")

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        return {**new_averages(weight, weight.shape)}

    def directions(self, A: "Factor", B: "Factor") -> "tuple[Tensor, Tensor]":
        of_A = self._solve(B[0].t() @ B[0], A[1])
        of_B = self._solve(A[0] @ A[0].t(), B[1].t()).t()
        return self._adam(of_A, A[2]), self._adam(of_B, B[2])

    def _solve(self, gram: "Tensor", grad: "Tensor") -> "Tensor":
        """P(gram) grad; gram (r, r), grad (r, any). In float64: the damping is below the rounding of float32."""
        import torch

        gram = gram.double()
        mean = gram.diagonal().mean()
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        damped = torch.where(mean > 0, gram / mean.clamp_min(1e-30), identity) + self.damping * identity
        return (torch.linalg.inv(damped).float()) @ grad

    def _adam(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        mean, squares = averages(grad, state, self.betas)
        mean, squares = (m / (1 - b ** state["step"]) for m, b in zip((mean, squares), self.betas, strict=True))
        return mean / (squares.sqrt() + self.eps)
