"""optimizer=dct_adamw: Adam in the subspace of the cosine vectors that are strongest in the gradient (Modoranu et al.,
arXiv 2505.17967, algorithm DCT-AdamW); AdamW for the rest.

    G <- g + e                       e: what earlier updates left out, in 8-bit codes (`error_feedback=false`: none)
    S = G Q; the `rank` columns with the largest L1 norm are R, e <- G - R Q_r^T       (or rows, on the shorter side)
    m, v                             of columns that stay are kept, of others begin at zero; then Adam's averages of R
    direction = c m / (sqrt(v) + eps) Q_r^T        c: Adam's bias correction

A subspace is `rank` numbers, chosen anew every `update_every` updates, without a decomposition. The paper's moments are
turned by Q_old^T Q_new, which is what keeping and zeroing columns of one orthonormal basis is.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import MatrixRule, check_betas
from sltrain.optim.moments import averages, bias_correction, new_averages
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CosineRule(MatrixRule):
    """What the optimizers on cosine vectors share."""

    rank: int = MISSING  # cosine vectors; matrices whose shorter side is not above it go to `others`

    copies_on_cpu: ClassVar[int] = 7
    copies_on_cuda: ClassVar[int] = 7

    def check(self) -> None:
        super().check()
        if self.rank < 1:
            raise ValueError(f"optimizer.rank={self.rank}: must be at least 1")

    def takes(self, parameter: ParamInfo) -> bool:
        return super().takes(parameter) and min(parameter.shape) > self.rank


@OPTIMIZERS.register("dct_adamw")
@dataclass
class DCTAdamW(CosineRule):
    """Options of optimizer=dct_adamw."""

    update_every: int = 1  # updates between two choices of vectors
    error_feedback: bool = True
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    eps: float = 1e-8

    whole_moments: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.update_every < 1:
            raise ValueError(f"optimizer.update_every={self.update_every}: must be at least 1")
        check_betas(self.betas)

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        import torch

        from sltrain.optim.blockwise import new_codes

        rows, columns = weight.shape
        shape = (rows, self.rank) if rows >= columns else (self.rank, columns)
        left_out = new_codes(weight) if self.error_feedback else {}
        return {"numbers": weight.new_zeros(self.rank, dtype=torch.int32), **new_averages(weight, shape), **left_out}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        from sltrain.optim.blockwise import decode, encode
        from sltrain.optim.cosine import strongest, transform, vectors

        is_tall = grad.shape[0] >= grad.shape[1]
        if self.error_feedback:
            grad = grad + decode(state)
        products = transform(grad)
        if (state["step"] - 1) % self.update_every == 0:
            self._choose(strongest(products, is_tall, self.rank), state, is_tall)
        numbers = state["numbers"].long()
        projected = products.index_select(1 if is_tall else 0, numbers)
        basis = vectors(min(grad.shape), numbers)
        if self.error_feedback:
            encode(grad - (projected @ basis.t() if is_tall else basis @ projected), state)
        mean, squares = averages(projected, state, self.betas)
        adapted = bias_correction(state["step"], self.betas) * mean / (squares.sqrt() + self.eps)
        return adapted @ basis.t() if is_tall else basis @ adapted

    def _choose(self, numbers: "Tensor", state: dict[str, Any], is_tall: bool) -> None:
        """Make `numbers` (ascending) the subspace: moments of vectors that stay move to their new place."""
        import torch

        old, dim = state["numbers"].long(), 1 if is_tall else 0
        places = torch.searchsorted(old, numbers).clamp_max(self.rank - 1)
        stays = (old[places] == numbers).float()
        for key in ("exp_avg", "exp_avg_sq"):
            moved = state[key].index_select(dim, places)
            state[key].copy_(moved * (stays if is_tall else stays[:, None]))
        state["numbers"].copy_(numbers)
