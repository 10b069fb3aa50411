"""W = (alpha / rank) B A: the paper's low-rank baseline."""

from typing import Any

import torch
from torch import Tensor

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.factors import FactoredLinear

STARTS = ("spectral", "uniform", "xavier")


class LowRankLinear(FactoredLinear, kind="low_rank"):
    """y = x W^T + bias with W = (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Computed as (x A^T) B^T, which needs no dense matrix and fewer operations when rank < in * out / (in + out).
    Parameters A (rank, in), B (out, rank), bias (out,) or None. `start` is one of STARTS, see layers/factors.py;
    `init_std` is the standard deviation of the dense matrix that the spectral one is nearest to. Raises ValueError for
    a rank outside [1, min(in, out)] and another start.
    """

    def prepare(self, like: dict[str, Any], rank: int, alpha: float, *, start: str = "spectral") -> None:
        self.make_factors(like, rank, alpha)
        if start not in STARTS:
            raise ValueError(f"start is {start!r}; choose one of {', '.join(STARTS)}")
        self.start = start

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.starts:
            self.reset_by_starts(generator)
            return
        if self.start == "uniform":
            self.reset_factors(generator, zero_B=False)
            return
        if self.start == "xavier":
            self.reset_xavier(generator)
        else:
            self.reset_spectral(self.init_std, generator)
        self.reset_bias(generator)

    def set_weight(self, weight: Tensor) -> None:
        """The nearest matrix of this rank."""
        self.set_factors(weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale * aligned_linear(x, self.A)  # (..., rank); a scaled B would be kept for backward
        return aligned_linear(hidden, self.B, self.bias)

    def footprint(self, rows: Rows) -> Footprint:
        """h = x A^T is kept; u = dy B is temporary."""
        hidden = rows.num_rows * self.rank * rows.element_size
        return Footprint(hidden, hidden + 2 * cast_bytes([self], rows), gradients=gradient_bytes(self))
