"""optimizer=fira: GaLore, and what it leaves out of the gradient, scaled as Adam scales the projection (Chen et al.,
arXiv 2410.01623, algorithm 1). projected.py has the notation.

    phi   |N| / |R| of each row, or column: how much Adam changes its size
    direction = c (scale P N + limited(phi (G - scale P R)))

The second part may grow by 1 % from one update to the next. As in the authors' code `scale` also multiplies P R, so
that below 1 a share of the projection stays in the rest.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.galore import GaLore
from sltrain.optim.kinds.projected import channel_norms, limit_growth

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("fira")
@dataclass
class Fira(GaLore):
    """Options of optimizer=fira."""

    copies_on_cpu: ClassVar[int] = 3

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        import torch

        return {**super().new_state(weight), "norm": weight.new_zeros((), dtype=torch.float32)}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        projected = self.project(grad, state)
        adapted = self.adam(projected, state)
        phi = channel_norms(adapted, self.rank) / (channel_norms(projected, self.rank) + 1e-8)
        rest = limit_growth((grad - self.scale * self.back(projected, state)) * phi, state)
        return rest.add_(self.back(adapted, state), alpha=self.scale).mul_(self.correction(state["step"]))
