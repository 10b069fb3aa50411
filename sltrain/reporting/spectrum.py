"""Where the singular values of a trained W = L + S come from, when L has rank r and S few entries.

    W (out, in) = sum over i of sigma_i u_i v_i^T         sigma_1 >= sigma_2 >= ... >= 0
    L = s B A                                             B (out, r), A (r, in)

L has r singular values above 0, S as a rule min(out, in) of them, small and alike. In W the two hardly meet: sigma_1
to sigma_r are about those of L, the others about those of S, and between them is a cliff, sigma_r / sigma_(r+1)
(figures 2, 10 and 11 of arXiv 2406.02214). How much of W either part carries is told by energies, squared Frobenius
norms: |L|^2 + |S|^2 is |W|^2 up to 2 <L, S>, which is small where the entries of S lie at random.

    rank of W              how many sigma_i are not 0: full, says the paper, although L alone would allow r
    effective rank of W    exp(-sum p_i log p_i), p_i = sigma_i / sum sigma: k if k values are equal and the others 0
                           (Roy and Vetterli 2007)

Everything is computed in float64, on one matrix at a time. L is never formed: with B = Q_B R_B and A^T = Q_A R_A its
singular values are those of R_B R_A^T, an (r, r) matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Spectrum:
    """Singular values of one W and of its parts, descending; None for a part that W does not have."""

    whole: Tensor  # (min(out, in),)
    low_rank: Tensor | None = None  # (rank,)
    sparse: Tensor | None = None  # (min(out, in),)

    @property
    def rank(self) -> int | None:
        """r, the number of columns of B."""
        return None if self.low_rank is None else len(self.low_rank)

    @property
    def cliff(self) -> float:
        """sigma_r / sigma_(r+1) of W: infinite if only the latter is 0, nan where there is no such pair."""
        if not self.rank or self.rank >= len(self.whole):
            return math.nan
        before, after = self.whole[self.rank - 1 : self.rank + 1].tolist()
        return before / after if after else math.inf if before else math.nan

    @property
    def numerical_rank(self) -> int:
        """How many singular values of W are not 0."""
        return int(self.whole.count_nonzero())

    @property
    def effective_rank(self) -> float:
        """How many singular values W has, each counted by its size; 0 for W = 0."""
        positive = self.whole[self.whole > 0]
        shares = positive / positive.sum()
        return float(torch.exp(-(shares * shares.log()).sum())) if len(positive) else 0.0


@dataclass
class Energy:
    """Squared Frobenius norms of L and S."""

    low_rank: float
    sparse: float

    @property
    def sparse_share(self) -> float:
        """The part of S, 0 to 1; nan if both are 0."""
        total = self.low_rank + self.sparse
        return self.sparse / total if total else math.nan


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """(out, in) -> (min(out, in),) float64, descending. What rounding cannot tell from 0 is 0."""
    matrix = matrix.double()
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.t()  # several times faster than a wide one
    return _without_noise(torch.linalg.svdvals(tall), max(matrix.shape))


@torch.no_grad()
def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """B (out, r), A (r, in) -> the singular values of B A that can be above 0, (r,) float64, descending."""
    left = torch.linalg.qr(B.double(), mode="r").R
    right = torch.linalg.qr(A.double().t(), mode="r").R
    return _without_noise(torch.linalg.svdvals(left @ right.t()), max(len(B), A.shape[1]))


def _without_noise(values: Tensor, longer: int) -> Tensor:
    """With 0 for what is below the rounding of a matrix whose longer side is `longer`: NumPy's rule for ranks."""
    tolerance = values.max() * longer * torch.finfo(values.dtype).eps if len(values) else 0.0
    return torch.where(values > tolerance, values, torch.zeros_like(values))
