"""The summands of a W, each with its dense matrix, Frobenius norm and singular values, computed the cheapest way.

|B A|^2 is the sum of (B^T B) * (A A^T). With B = Q_B R_B and A^T = Q_A R_A the singular values of B A are those of
R_B R_A^T: both need (r, r) matrices only. Singular values are computed in float64, and are 0 below rounding error.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sltrain.layers.support import Support


class Part(ABC):
    """One summand of W, (out, in), detached from autograd."""

    group: ClassVar[str]  # dense, low_rank or sparse: norms are summed by group

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, (out, in), in the dtype of the parameters."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Frobenius norm, 0-d float32."""

    def singular_values(self) -> Tensor:
        """The singular values that can be above 0, at most min(out, in), float64, descending."""
        return singular_values(self.dense())


@dataclass(frozen=True)
class DensePart(Part):
    """scale * a dense matrix (out, in)."""

    matrix: Tensor
    scale: float | Tensor = 1.0
    group = "dense"

    def dense(self) -> Tensor:
        matrix = self.matrix.detach()
        return matrix if isinstance(self.scale, float) and self.scale == 1 else self.scale * matrix

    def norm(self) -> Tensor:
        return self.scale * self.matrix.detach().float().norm()


@dataclass(frozen=True)
class LowRankPart(Part):
    """scale * B A with B (out, r), A (r, in); it has r singular values."""

    B: Tensor
    A: Tensor
    scale: float = 1.0
    group = "low_rank"

    @property
    def rank(self) -> int:
        """r, the number of columns of B."""
        return self.B.shape[1]

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.B @ (self.scale * self.A)

    @torch.no_grad()
    def norm(self) -> Tensor:
        A, B = self.A.float(), self.B.float()
        square = ((B.t() @ B) * (A @ A.t())).sum()
        return self.scale * square.clamp(min=0).sqrt()  # rounding can take a tiny square below 0

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        left = torch.linalg.qr(self.B.double(), mode="r").R
        right = torch.linalg.qr(self.A.double().t(), mode="r").R
        values = torch.linalg.svdvals(left @ right.t())
        return self.scale * _without_noise(values, max(len(self.B), self.A.shape[1]))


@dataclass(frozen=True)
class SparsePart(Part):
    """S: its values (nnz,), and their places, the indices that `support` drew."""

    values: Tensor
    indices: Tensor
    support: Support
    group = "sparse"

    @torch.no_grad()
    def dense(self) -> Tensor:
        flat = self.values.new_zeros(self.support.num_entries)
        for entries, positions in self.support.pieces(self.indices):
            flat[positions] = self.values[entries]
        return flat.view(self.support.out_features, self.support.in_features)

    def norm(self) -> Tensor:
        return self.values.detach().float().norm()


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix (out, in): (min(out, in),) float64, descending."""
    matrix = matrix.double()
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.t()  # several times faster than a wide one
    return _without_noise(torch.linalg.svdvals(tall), max(matrix.shape))


def _without_noise(values: Tensor, longer: int) -> Tensor:
    """Set values below the rounding error of a matrix with this longer side to 0: NumPy's rule for ranks."""
    tolerance = values.max() * longer * torch.finfo(values.dtype).eps if len(values) else 0.0
    return torch.where(values > tolerance, values, torch.zeros_like(values))
