"""What layers with a low-rank product (alpha / rank) B A share: the factors, an optional bias, and their start.

    tensor   start                                             source
    A        uniform in +-1/sqrt(in)                           Kaiming-uniform with a = sqrt(5), as torch's nn.Linear
    B        zero, when there is an S                          the paper: training starts from W = S
             uniform, when there is none                       see below
    values   uniform in +-1/sqrt(in)                           the paper
    bias     uniform in +-1/sqrt(in)                           nn.Linear

Without S a zero B makes W zero. Zero query, key, value and output projections pass no gradient to each other, so a
model made of them never starts to learn. B is then uniform with the standard deviation 1/(scale * sqrt(rank)), which
gives the entries of scale * B A the variance of nn.Linear's, 1/(3 in).

A layer that starts from a dense matrix instead has B A from its singular value decomposition, see `set_factors`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.base import ReplacedLinear, fill_uniform
from sltrain.layers.parts import LowRankPart, Part


class FactoredLinear(ReplacedLinear):
    """The base of layers with factors A (rank, in), B (out, rank). `like` are their device and dtype. Raises ValueError
    for a rank outside [0, min(in, out)] and an alpha that is not above 0."""

    GROUPS = {"A": "low_rank", "B": "low_rank"}

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, bias: bool, path: str = "auto", **like: Any
    ) -> None:
        super().__init__(in_features, out_features, path)
        limit = min(in_features, out_features)
        if not 0 <= rank <= limit:
            raise ValueError(
                f"rank must be between 0 and {limit} for a {out_features} x {in_features} matrix, got {rank}"
            )
        if rank > 0 and not alpha > 0:
            raise ValueError(f"alpha must be above 0 (the low-rank product is scaled by alpha / rank), got {alpha}")
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank if rank else 0.0
        self.A = nn.Parameter(torch.empty(rank, in_features, **like))
        self.B = nn.Parameter(torch.empty(out_features, rank, **like))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None

    def parts(self) -> dict[str, Part]:
        return {"BA": LowRankPart(self.B.detach(), self.A.detach(), self.scale)} if self.rank else {}

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    def multiply_adds(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    @torch.no_grad()
    def reset_factors(self, generator: torch.Generator | None, zero_B: bool) -> None:
        """Fill A, B and the bias by the table at the top."""
        bound = 1 / math.sqrt(self.in_features)
        fill_uniform(self.A, bound, generator)
        if zero_B:
            nn.init.zeros_(self.B)
        else:  # uniform in +-b has the variance b^2 / 3
            fill_uniform(self.B, math.sqrt(3 / self.rank) / self.scale, generator)
        if self.bias is not None:
            fill_uniform(self.bias, bound, generator)

    @torch.no_grad()
    def set_factors(self, weight: Tensor) -> None:
        """Make scale * B A the nearest matrix of its rank to `weight` (out, in), up to the rounding of A and B, whose
        columns and rows share the singular values evenly.

        The decomposition is exact, in float32 (`torch.linalg.svd`): `svd_lowrank` draws from the global generator and
        misses a part of the flat spectra that W has, and this is done once a run.
        """
        if self.rank == 0:
            return
        matrix = weight.detach().float()
        is_wide = matrix.shape[0] < matrix.shape[1]  # a tall matrix is decomposed several times faster
        left, values, right = torch.linalg.svd(matrix.t() if is_wide else matrix, full_matrices=False)
        columns, rows = (right.t(), left.t()) if is_wide else (left, right)
        roots = (values[: self.rank] / self.scale).sqrt()
        self.B.copy_(columns[:, : self.rank] * roots)
        self.A.copy_(roots[:, None] * rows[: self.rank])
