"""y = x (B A)^T + beta y', y' the output of the same projection one decoder layer before: CR-Net's (Kong et al.,
arXiv 2509.18993, section 3)."""

from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.factors import FactoredLinear


class CRNetLinear(FactoredLinear, kind="cr_net"):
    """y = x A^T B^T + beta previous + bias; x (..., in_features), previous and y (..., out_features).

    Parameters A (rank, in), B (out, rank), beta (1,), bias (out,) or None. B A starts as kind low_rank's, beta as
    `start_beta`. There is no W: y depends on more than x. Raises ValueError for a rank outside [1, min(in, out)].
    """

    GROUPS = {**FactoredLinear.GROUPS, "beta": "scale"}
    CODE = "_cr_net_code.py"
    takes_previous = True
    is_mergeable = False

    def prepare(self, like: dict[str, Any], rank: int, start_beta: float = 1.0) -> None:
        self.make_factors(like, rank)
        self.beta = nn.Parameter(torch.empty(1, **like))
        self.start_beta = start_beta

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.reset_spectral(self.init_std, generator)
        nn.init.constant_(self.beta, self.start_beta)
        self.reset_bias(generator)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        y = aligned_linear(aligned_linear(x, self.A), self.B, self.bias)
        return y + self.beta.to(y.dtype) * previous

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def multiply_adds(self) -> int:
        return super().multiply_adds() + self.out_features

    def footprint(self, rows: Rows) -> Footprint:
        """h = x A^T is kept, and beta if it is cast; u = dy B is temporary, or, before dx and other gradients are, the
        product of dy and `previous` whose sum is the gradient of beta. `previous` and its gradient are counted by who
        passes it."""
        size, gradients = rows.num_rows * rows.element_size, gradient_bytes(self)
        hidden, casts = size * self.rank, cast_bytes([self], rows)
        product = size * (self.out_features - self.in_features) - gradients
        kept = hidden + (rows.element_size if casts else 0)
        return Footprint(kept, max(hidden + 2 * casts, product), gradients)
