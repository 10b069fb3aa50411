"""optimizer=spectron: orthogonalized momentum on A and B, inside a radius that bounds how far B A moves (Spectron,
arXiv 2602.12429); AdamW for the rest, the values of S included (lr_scale={values: ...} gives them a rate of their own).

    m <- b m + (1 - b) g;   O = NS(m) for each factor                NS: optim/orthogonal.py, on the short side
    direction = O / (sigma_A + sigma_B + 1)

sigma is the largest singular value of a factor, by one step of power iteration an update from where the last one ended.
With |O| about 1, B A moves by at most lr (sigma_A + sigma_B + lr) / (sigma_A + sigma_B + 1) in the spectral norm.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import PairRule, check_share

if TYPE_CHECKING:
    from torch import Tensor

    from sltrain.optim.rule import Factor


@OPTIMIZERS.register("spectron")
@dataclass
class Spectron(PairRule):
    """Options of optimizer=spectron."""

    momentum: float = 0.95

    whole_moments: ClassVar[bool] = False
    copies_on_cpu: ClassVar[int] = 8
    copies_on_cuda: ClassVar[int] = 8

    def check(self) -> None:
        super().check()
        check_share(momentum=self.momentum)

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        import torch

        from sltrain.optim.basis import normal

        left = weight.new_zeros(weight.shape[0], dtype=torch.float32)
        if not weight.is_meta:
            left.copy_(normal(tuple(weight.shape[:1]), 0, weight.device))
            left /= left.norm()
        return {"momentum": weight.new_zeros(weight.shape), "left": left}

    def directions(self, A: "Factor", B: "Factor") -> "tuple[Tensor, Tensor]":
        radius = 1 / (largest_singular_value(A[0], A[2]) + largest_singular_value(B[0], B[2]) + 1)
        return radius * self._orthogonal(*A[1:]), radius * self._orthogonal(*B[1:])

    def _orthogonal(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        from sltrain.optim.orthogonal import newton_schulz

        kept = state["momentum"]
        return newton_schulz(kept.lerp_(grad.to(kept.dtype), 1 - self.momentum).float())


def largest_singular_value(weight: "Tensor", state: dict[str, Any]) -> "Tensor":
    """One step of power iteration from state["left"], which it moves on; 0 for a zero matrix, which leaves it."""
    right = weight.t() @ state["left"]
    moved = weight @ (right / right.norm().clamp_min(1e-30))
    sigma = moved.norm()
    state["left"].copy_((moved / sigma.clamp_min(1e-30)).where(sigma > 1e-30, state["left"]))
    return sigma
