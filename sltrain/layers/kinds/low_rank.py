"""W = (alpha / rank) B A: the paper's low-rank baseline."""

import math

import torch
from torch import Tensor

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, cast_bytes, fill_uniform, gradient_bytes
from sltrain.layers.factors import FactoredLinear

STARTS = ("spectral", "uniform", "xavier")


class LowRankLinear(FactoredLinear, kind="low_rank"):
    """y = x W^T + bias with W = (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Computed as (x A^T) B^T, which needs no dense matrix and fewer operations when rank < in * out / (in + out).
    Parameters A (rank, in), B (out, rank), bias (out,) or None. `start` is one of STARTS, see layers/factors.py;
    `init_std` is the standard deviation of the dense matrix that the spectral one is nearest to, by default that of
    nn.Linear, 1/sqrt(3 in). Construction, meta and `generator` as in SLTrainLinear; raises ValueError for a rank
    outside [1, min(in, out)] and another start.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        start: str = "spectral",
        init_std: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, bias, device=device, dtype=dtype)
        if rank == 0:
            raise ValueError("a low-rank layer needs a rank of at least 1, got 0")
        if start not in STARTS:
            raise ValueError(f"start is {start!r}; choose one of {', '.join(STARTS)}")
        self.start, self.init_std = start, 1 / math.sqrt(3 * in_features) if init_std is None else init_std
        if not self.A.is_meta:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.start == "uniform":
            self.reset_factors(generator, zero_B=False)
            return
        if self.start == "xavier":
            self.reset_xavier(generator)
        else:
            self.reset_spectral(self.init_std, generator)
        if self.bias is not None:
            fill_uniform(self.bias, 1 / math.sqrt(self.in_features), generator)

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
