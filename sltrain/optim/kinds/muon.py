"""optimizer=muon: momentum, made orthogonal, for matrices; AdamW for the rest (Jordan et al., 2024; torch.optim.Muon).

    m <- momentum m + g;   direction = scale NS(g + momentum m)      NS: optim/orthogonal.py, on the short side

One moment, which `momentum_dtype=int8` keeps in a byte an entry. `scale=match_rms` is 0.2 sqrt(max(out, in)), with
which Adam's learning rates and weight decays fit (Moonlight, arXiv 2502.16982, section 2.2); `original` is
sqrt(max(1, out / in)). Of factored weights it orthogonalizes A and B each by itself.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.rule import MatrixRule, check_share

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("muon")
@dataclass
class Muon(MatrixRule):
    """Options of optimizer=muon."""

    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "match_rms"  # or original
    momentum_dtype: str = "auto"  # as the weights; int8: blocks of 8-bit codes

    copies_on_cpu: ClassVar[int] = 6  # measured, of a square matrix
    copies_on_cuda: ClassVar[int] = 4  # the iteration is in bfloat16

    def check(self) -> None:
        super().check()
        check_share(momentum=self.momentum)
        check_scale(self.scale)
        if self.momentum_dtype not in ("auto", "int8"):
            raise ValueError(f"optimizer.momentum_dtype={self.momentum_dtype}: choose one of auto, int8")

    def keeps_whole_moments(self, rounded: bool) -> bool:
        return super().keeps_whole_moments(rounded) and self.momentum_dtype == "auto"

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        from sltrain.optim.blockwise import new_codes

        return new_codes(weight) if self.momentum_dtype == "int8" else {"momentum": weight.new_zeros(weight.shape)}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        import torch

        from sltrain.optim.blockwise import decode, encode
        from sltrain.optim.orthogonal import newton_schulz

        if self.momentum_dtype == "int8":
            momentum = decode(state).mul_(self.momentum).add_(grad)
            encode(momentum, state)
            mixed = momentum.mul_(self.momentum).add_(grad) if self.nesterov else momentum
        else:
            momentum = state["momentum"].mul_(self.momentum).add_(grad)
            mixed = torch.add(grad, momentum, alpha=self.momentum) if self.nesterov else momentum.float()
        return newton_schulz(mixed).mul_(size_of_update(self.scale, *grad.shape))


def check_scale(scale: str) -> None:
    """Raise ValueError for an unknown `optimizer.scale`."""
    if scale not in ("match_rms", "original"):
        raise ValueError(f"optimizer.scale={scale}: choose one of match_rms, original")


def size_of_update(scale: str, rows: int, columns: int) -> float:
    """What an orthogonal matrix is multiplied by, see above."""
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "match_rms" else math.sqrt(max(1, rows / columns))
