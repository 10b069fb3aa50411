"""optimizer=apollo: the whole gradient, its rows or columns scaled by what Adam makes of a random projection (Zhu et
al., arXiv 2412.05270, algorithm 1). projected.py has the notation.

    P   independent normal entries of variance 1 / rank, drawn anew every `update_every` updates
    s   |N| / |R| of each row, or column (`per=channel`), or of the whole (`per=tensor`)
    direction = c sqrt(scale) limited(s G)       the norm may grow by 1 % from one update to the next

`apollo_mini` is rank 1 and one s a matrix, with scale=128. P is drawn from the shape and the number of the renewal
alone: every rank, and a continued run, draws the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.projected import Projected, channel_norms, limit_growth
from sltrain.optim.kinds.rule import check_finite

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("apollo")
@dataclass
class Apollo(Projected):
    """Options of optimizer=apollo."""

    scale: float = 1.0  # its square root multiplies the direction, as the authors' option of that name
    per: str = "channel"  # or tensor

    def check(self) -> None:
        super().check()
        if self.per not in ("channel", "tensor"):
            raise ValueError(f"optimizer.per={self.per}: choose one of channel, tensor")
        check_finite(scale=self.scale)

    def new_basis(self, grad: "Tensor", number: int) -> "Tensor":
        from sltrain.optim.basis import normal

        return normal((min(grad.shape), self.rank), number, grad.device) / self.rank**0.5

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        import torch

        return {**super().new_state(weight), "norm": weight.new_zeros((), dtype=torch.float32)}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        projected = self.project(grad, state)
        adapted = self.adam(projected, state)
        if self.per == "tensor":
            factor = adapted.norm() / (projected.norm() + 1e-8)
        else:
            factor = channel_norms(adapted, self.rank) / (channel_norms(projected, self.rank) + 1e-8)
        return limit_growth(grad * factor, state).mul_(self.correction(state["step"]) * self.scale**0.5)
