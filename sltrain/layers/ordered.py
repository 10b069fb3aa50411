"""B A whose ranks are ordered: training uses the first `active` of them, everything else the first `kept` (Horvath et
al., Maestro, arXiv 2308.14929).

Because a prefix is trained more often than the rest, the first ranks learn what matters most, as singular vectors do.
The penalty orders them further, and empties the last ones:

    sum over b of |A[b:]| + |B[:, b:]|          hierarchical group lasso, Frobenius norms; section 3

so that the ranks from some b on can be cut. Cut ranks are 0 in both factors, which keep their shapes: saved weights are
those of a low-rank layer.
"""

from typing import Any

import torch
from torch import Tensor

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, gradient_bytes
from sltrain.layers.kinds.low_rank import LowRankLinear


class OrderedLinear(LowRankLinear):
    """A low-rank layer with two numbers that are no tensors: `kept`, the ranks that are not cut, and `active`, those
    that are used while the module is in training mode."""

    def prepare(self, *sizes: Any, **settings: Any) -> None:
        super().prepare(*sizes, **settings)
        self.kept = self.active = self.rank

    def forward(self, x: Tensor) -> Tensor:
        used = self.active if self.training else self.kept
        if used == self.rank:
            return super().forward(x)
        return aligned_linear(self.scale * aligned_linear(x, self.A[:used]), self.B[:, :used], self.bias)

    def multiply_adds(self) -> int:
        """Of the ranks that are left, which evaluation uses; updates use fewer where ranks are drawn."""
        return self.kept * (self.in_features + self.out_features)

    def footprint(self, rows: Rows) -> Footprint:
        """Of all ranks. The gradients of the used part exist beside those of the whole."""
        whole = super().footprint(rows)
        return Footprint(whole.kept, whole.temporary + gradient_bytes(self), whole.gradients)

    @torch.no_grad()
    def add_penalty(self, strength: float) -> None:
        """Add the gradient of strength * penalty of the kept ranks to those of A and B, which a backward has left."""
        kept = self.kept
        for factor, ranks in ((self.A, 0), (self.B, 1)):
            if kept == 0 or factor.grad is None:
                continue
            each = (1 / self._tails(factor.narrow(ranks, 0, kept), ranks).clamp_min(1e-30)).cumsum(0)
            weight = each.unsqueeze(1 - ranks).to(factor.dtype)
            factor.grad.narrow(ranks, 0, kept).add_(factor.narrow(ranks, 0, kept) * weight, alpha=strength)

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """Cut the ranks from the first b on with |A[b:]| |B[:, b:]| below the threshold."""
        importance = self._tails(self.A, 0) * self._tails(self.B, 1)
        self.kept = min(self.kept, int((importance >= threshold).sum()))
        self.active = min(self.active, self.kept)

    @torch.no_grad()
    def clear_cut(self) -> None:
        """Set cut ranks to 0: an optimizer that remembers older gradients moves them."""
        self.A[self.kept :].zero_()
        self.B[:, self.kept :].zero_()

    @staticmethod
    def _tails(factor: Tensor, ranks: int) -> Tensor:
        """The norm from each rank on to the last: (number of ranks,), at least float32; `ranks` is their dimension."""
        exact = torch.promote_types(factor.dtype, torch.float32)
        squares = torch.linalg.vector_norm(factor, dim=1 - ranks, dtype=exact).square()
        return squares.flip(0).cumsum(0).flip(0).sqrt()
