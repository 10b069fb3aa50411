"""The base of optimizers that keep Adam's moments of a projected gradient (GaLore, Zhao et al., arXiv 2403.03507).

    G (out, in), its shorter side of size d        basis P (d, rank), renewed every `update_every` updates
    R = G P if out >= in, else P^T G               rank numbers instead of d for each row, or column, of the other side
    N = m / (sqrt(v) + eps)                        Adam's moments m, v of R, which stay when the basis is renewed
    c = sqrt(1 - b2^t) / (1 - b1^t)                Adam's bias correction, of the whole direction

State for a matrix: d rank of P and 2 rank max(out, in) of moments, instead of 2 out in. `moments_dtype=8bit` keeps the
moments in 8-bit codes, as the authors' GaLoreAdamW8bit does: a byte each, a scale a block of 256 (optim/dynamic.py).
Everything is computed from the sum of an update's gradients, so it is right with several micro-batches and inside
backward alike.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from sltrain.optim.kinds.adamw import AdamWOptions
from sltrain.optim.kinds.base import OptimizerConfig
from sltrain.optim.kinds.rule import MatrixRule, check_betas
from sltrain.optim.moments import averages, bias_correction, new_averages
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    from torch import Tensor

MOMENTS = ("auto", "float32", "8bit")
MAX_GROWTH = 1.01  # of the norm of what Fira and APOLLO add, from one update to the next


@dataclass
class Projected(MatrixRule):
    """A subclass defines `new_basis` and `direction`."""

    rank: int = MISSING  # of the projection; matrices whose shorter side is not above it go to `others`
    update_every: int = 200  # updates between two bases
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    eps: float = 1e-8
    moments_dtype: str = "auto"  # auto: as the weights; float32: also those of bfloat16 weights; 8bit: codes

    whole_moments: ClassVar[bool] = False
    copies_on_cpu: ClassVar[int] = 4
    copies_on_cuda: ClassVar[int] = 4

    def check(self) -> None:
        super().check()
        for name in ("rank", "update_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: must be at least 1")
        check_betas(self.betas)
        if self.moments_dtype not in MOMENTS:
            raise ValueError(f"optimizer.moments_dtype={self.moments_dtype}: choose one of {', '.join(MOMENTS)}")

    def takes(self, parameter: ParamInfo) -> bool:
        return super().takes(parameter) and min(parameter.shape) > self.rank

    def rest(self) -> OptimizerConfig:
        """Where that is AdamW, with float32 moments if these have them."""
        others = super().rest()
        if self.moments_dtype == "float32" and isinstance(others, AdamWOptions):
            return replace(others, moments_dtype="float32")
        return others

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        basis = weight.new_zeros(min(weight.shape), self.rank)
        return {"basis": basis, "is_chosen": 0, **self.new_moments(weight)}

    def new_moments(self, weight: "Tensor") -> "dict[str, Tensor]":
        """Moments of R, zero, where `weight` is."""
        import torch

        from sltrain.optim import dynamic

        rows, columns = weight.shape
        shape = (rows, self.rank) if rows >= columns else (self.rank, columns)
        if self.moments_dtype == "8bit":
            return dynamic.new_averages(weight, shape)
        return new_averages(weight, shape, torch.float32 if self.moments_dtype == "float32" else None)

    def moments(self, projected: "Tensor", state: dict[str, Any]) -> "tuple[Tensor, Tensor]":
        """m and v, float32, once they have taken R in."""
        from sltrain.optim import dynamic

        take_in = dynamic.averages if self.moments_dtype == "8bit" else averages
        return take_in(projected, state, self.betas)

    def step_bytes(self, parameter: ParamInfo, device_type: str, rounding: bool) -> int:
        """What a decomposition needs, or, while moments in codes change, the basis and six copies of R."""
        others = super().step_bytes(parameter, device_type, rounding)
        if self.moments_dtype != "8bit":
            return others
        copy_of_gradient = parameter.numel if parameter.element_size < 4 else 0
        in_codes = self.rank * (min(parameter.shape) + 6 * max(parameter.shape)) + copy_of_gradient
        return max(others, 4 * in_codes)

    def new_basis(self, grad: "Tensor", number: int) -> "Tensor":
        """The basis (shorter side, rank) for the updates after `number` renewals."""
        raise TypeError(f"{type(self).__name__} does not define new_basis")

    def project(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        """R, with a new basis if one is due. A gradient of zeros, as that of A while B is zero, has no directions: the
        choice then waits for the first that is not."""
        number, left = divmod(state["step"] - 1, self.update_every)
        if left == 0 or not state["is_chosen"]:
            state["basis"].copy_(self.new_basis(grad, number))
            state["is_chosen"] = int(bool(grad.any()))
        basis = state["basis"].float()
        return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.t() @ grad

    def back(self, projected: "Tensor", state: dict[str, Any]) -> "Tensor":
        """(out, in) from what has the shape of R."""
        basis = state["basis"].float()
        return projected @ basis.t() if projected.shape[1] == self.rank else basis @ projected

    def adam(self, projected: "Tensor", state: dict[str, Any]) -> "Tensor":
        """N, once the moments have taken R in."""
        mean, squares = self.moments(projected, state)
        return mean / (squares.sqrt() + self.eps)

    def correction(self, step: int) -> float:
        """c of the table at the top."""
        return bias_correction(step, self.betas)


def channel_norms(projected: "Tensor", rank: int) -> "Tensor":
    """The norms of the rows, or columns, of R: (out, 1) or (1, in)."""
    return projected.norm(dim=1 if projected.shape[1] == rank else 0, keepdim=True)


def limit_growth(added: "Tensor", state: dict[str, Any]) -> "Tensor":
    """`added`, made smaller in place if its norm exceeds MAX_GROWTH times that of the update before (Fira, section
    4.3). state["norm"] keeps the norm; it is 0 before the first update."""
    norm, before = added.norm(), state["norm"]
    largest = before * MAX_GROWTH
    shrink = ((norm > largest) & (before > 0)).float()
    factor = 1 + shrink * (largest / norm.clamp_min(1e-30) - 1)
    before.copy_(norm * factor)
    return added.mul_(factor)
