"""optimizer=q_galore: GaLore in few bits, with a basis that is renewed ever more seldom where it hardly moves (Zhang et
al., arXiv 2407.08296). projected.py and galore.py have the notation.

    P       in 4-bit codes, groups of 256 share a step and a zero point      affine.py
    m, v    of R in 8-bit codes, blocks of 256 share a scale                 optim/dynamic.py, `moments_dtype=8bit`
    direction = scale P N,   N = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

P is renewed every `interval` updates, at first `update_every`. With q the mean, over the last `queue` renewals, of the
|cosine| between the first vectors of the new P and of the one before: interval <- 2 interval where q >= `threshold`.
As in the authors' code the queue stays full, so while q stays high every renewal doubles the interval. The cosine is
taken in magnitude, because a decomposition leaves the sign of a singular vector open.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.kinds.galore import GaLore
from sltrain.optim.kinds.rule import check_finite

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("q_galore")
@dataclass
class QGaLore(GaLore):
    """Options of optimizer=q_galore."""

    threshold: float = 0.4  # mean similarity from which the interval doubles; above 1 it never does
    queue: int = 5  # renewals that the mean is over
    moments_dtype: str = "8bit"

    def check(self) -> None:
        super().check()
        check_finite(threshold=self.threshold)
        if self.queue < 1:
            raise ValueError(f"optimizer.queue={self.queue}: must be at least 1")

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        import torch

        from sltrain.affine import no_codes

        basis = no_codes(weight, min(weight.shape) * self.rank, bits=4)
        return {
            **{f"basis_{part}": tensor for part, tensor in basis._asdict().items()},
            "is_chosen": 0,
            "interval": self.update_every,
            "similarities": weight.new_full((self.queue,), -float("inf"), dtype=torch.float32),
            **self.new_moments(weight),
        }

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        if (state["step"] - 1) % state["interval"] == 0 or not state["is_chosen"]:
            self._renew(grad, state)
        basis, is_tall = self._basis(state, min(grad.shape)), grad.shape[0] >= grad.shape[1]
        adapted = self._adam(grad @ basis if is_tall else basis.t() @ grad, state)
        return self.scale * (adapted @ basis.t() if is_tall else basis @ adapted)

    def _basis(self, state: dict[str, Any], d: int) -> "Tensor":
        """P (d, rank), float32. Its codes are in the order of its vectors."""
        from sltrain.affine import Codes, decode

        stored = Codes(*(state[f"basis_{part}"] for part in Codes._fields))
        return decode(stored, d * self.rank, bits=4).view(self.rank, d).t()

    def _renew(self, grad: "Tensor", state: dict[str, Any]) -> None:
        """Keep the basis of this gradient, and lengthen the interval if it is much like those before. A gradient of
        zeros has no directions: the basis stays, the first one waits."""
        from sltrain.affine import encode

        if not grad.any():
            return
        fresh = self.new_basis(grad, (state["step"] - 1) // self.update_every)
        if state["is_chosen"]:
            before, now = self._basis(state, len(fresh))[:, 0], fresh[:, 0]
            similarity = (before @ now).abs() / (before.norm() * now.norm()).clamp_min(1e-30)
            state["similarities"].copy_(state["similarities"].roll(-1))
            state["similarities"][-1] = similarity
            if state["similarities"].mean().item() >= self.threshold:
                state["interval"] *= 2
        for part, tensor in encode(fresh.t().contiguous(), bits=4)._asdict().items():
            state[f"basis_{part}"].copy_(tensor)
        state["is_chosen"] = 1

    def _adam(self, projected: "Tensor", state: dict[str, Any]) -> "Tensor":
        """N, once the moments have taken R in."""
        mean, squares = self.moments(projected, state)
        mean, squares = (m / (1 - b ** state["step"]) for m, b in zip((mean, squares), self.betas, strict=True))
        return mean / (squares.sqrt() + self.eps)
