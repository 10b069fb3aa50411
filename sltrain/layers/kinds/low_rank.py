"""W = (alpha / rank) B A: the paper's low-rank baseline."""

import torch
from torch import Tensor

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.factors import FactoredLinear


class LowRankLinear(FactoredLinear, kind="low_rank"):
    """y = x W^T + bias with W = (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Computed as (x A^T) B^T, which needs no dense matrix and fewer operations when rank < in * out / (in + out).
    Parameters A (rank, in), B (out, rank), bias (out,) or None. Construction, meta and `generator` as in SLTrainLinear;
    raises ValueError for a rank outside [1, min(in, out)].
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
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, bias, device=device, dtype=dtype)
        if rank == 0:
            raise ValueError("a low-rank layer needs a rank of at least 1, got 0")
        if not self.A.is_meta:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.reset_factors(generator, zero_B=False)

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
