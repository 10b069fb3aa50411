"""What layers with a low-rank product (alpha / rank) B A share: the factors, an optional bias, and their start.

    tensor   start                                             source
    A        uniform in +-1/sqrt(in)                           Kaiming-uniform with a = sqrt(5), as torch's nn.Linear
    B        zero, when there is an S                          the paper: training starts from W = S
    A and B  spectral, when there is none                      Khodak et al., arXiv 2105.01029, section 3.2; see below
    values   uniform in +-1/sqrt(in)                           the paper
    bias     uniform in +-1/sqrt(in)                           nn.Linear

(`start=uniform` and `start=xavier` are others for A and B without S; parametrization=spectral has its own, which come
as `starts`.) A residual (residual.py) changes no start.

Without S a zero B makes W zero. Zero query, key, value and output projections pass no gradient to each other, so a
model made of them never starts to learn. The spectral start makes scale * B A what is nearest, at this rank, to a dense
matrix of independent entries: singular vectors uniformly distributed, singular values by the law of Marchenko and
Pastur. No dense matrix is decomposed for it: both are drawn directly. The uniform start gives B the standard deviation
1/(scale * sqrt(rank)), and so the entries of scale * B A the variance of nn.Linear's, 1/(3 in). All of that energy then
lies in few directions: the largest singular values are several times those of a dense start.

A layer that starts from a dense matrix instead has B A from its singular value decomposition, see `set_factors`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.base import fill_normal, fill_uniform
from sltrain.layers.parts import LowRankPart, Part
from sltrain.layers.residual import folded, residual_factor
from sltrain.layers.started import StartedLinear


class FactoredLinear(StartedLinear):
    """The base of layers with the parameters A (rank, in) and B (out, rank), whose product is scaled by alpha / rank;
    alpha None: by 1. `prepare` calls `make_factors`. Raises ValueError for a rank above min(in, out) or below
    LEAST_RANK, and an alpha that is not above 0."""

    GROUPS = {"A": "low_rank", "B": "low_rank"}
    LEAST_RANK = 1

    def make_factors(self, like: dict[str, Any], rank: int, alpha: float | None = None) -> None:
        """A and B, without values."""
        self.check_rank(rank, least=0)
        alpha = float(rank) if alpha is None else alpha
        if rank > 0 and not alpha > 0:
            raise ValueError(f"alpha must be above 0 (the low-rank product is scaled by alpha / rank), got {alpha}")
        if rank < self.LEAST_RANK:
            raise ValueError(f"a layer of kind {self.kind} needs a rank of at least {self.LEAST_RANK}, got {rank}")
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank if rank else 0.0
        self.residual = self.factor = 0.0
        self.A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.B = nn.Parameter(torch.empty(self.out_features, rank, **like))

    def set_residual(self, residual: float) -> None:
        """Let a subclass compute y + residual / sqrt(K) Expand(A x); 0: y. Raises ValueError for what is no number."""
        self.residual, self.factor = residual, residual_factor(residual, self.out_features, self.rank)

    def folded(self) -> Tensor:
        """The B, (out, rank), of the layer without a residual that computes the same."""
        return self._fold(self.B.detach())

    def _fold(self, B: Tensor, sign: float = 1.0) -> Tensor:
        """B with the residual added, or with the sign -1 taken away; B itself if there is none."""
        return folded(B, sign * self.factor / self.scale) if self.factor else B

    def parts(self) -> dict[str, Part]:
        return {"BA": LowRankPart(self.folded(), self.A.detach(), self.scale)} if self.rank else {}

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    def multiply_adds(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    @torch.no_grad()
    def reset_factors(self, generator: torch.Generator | None, zero_B: bool) -> None:
        """Fill A, B and the bias uniformly, by the table at the top."""
        fill_uniform(self.A, 1 / math.sqrt(self.in_features), generator)
        if zero_B:
            nn.init.zeros_(self.B)
        else:  # uniform in +-b has the variance b^2 / 3
            fill_uniform(self.B, math.sqrt(3 / self.rank) / self.scale, generator)
        self.reset_bias(generator)

    @torch.no_grad()
    def reset_spectral(self, std: float, generator: torch.Generator | None) -> None:
        """Fill A and B with the spectral start for a dense matrix of standard deviation `std`."""
        values = std * largest_singular_values(self.out_features, self.in_features, self.rank).float()
        roots = (values / self.scale).sqrt()
        self.A.copy_(roots[:, None] * orthonormal(self.in_features, self.rank, generator).t())
        self.B.copy_(orthonormal(self.out_features, self.rank, generator) * roots)

    @torch.no_grad()
    def reset_xavier(self, generator: torch.Generator | None) -> None:
        """Fill A and B normally, with variance 2 over the sum of their own sides (Glorot and Bengio, 2010), as if they
        were two layers; the scale of B A is not taken into account."""
        for factor in (self.A, self.B):
            drawn = torch.empty(factor.shape, dtype=torch.float32, device="cpu")
            factor.copy_(drawn.normal_(0, math.sqrt(2 / sum(factor.shape)), generator=generator))

    @torch.no_grad()
    def reset_by_starts(self, generator: torch.Generator | None) -> None:
        """Fill the tensors that `starts` names normally, and the bias with zeros."""
        for name, std in self.starts.items():
            fill_normal(self.get_parameter(name), std, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def set_factors(self, weight: Tensor) -> None:
        """Make scale * B A, residual included, the nearest matrix of its rank to `weight` (out, in), up to the rounding
        of A and B, whose columns and rows share the singular values evenly."""
        if self.rank == 0:
            return
        columns, values, rows = decompose(weight)
        roots = (values[: self.rank] / self.scale).sqrt()
        drawn = self.A.clone()
        self.B.copy_(self._fold(columns[:, : self.rank] * roots, -1))
        self.A.copy_(roots[:, None] * rows[: self.rank])
        self._revive(drawn)

    @torch.no_grad()
    def copy_trained(self, read: Callable[[str], Tensor]) -> None:
        drawn = self.A.clone()
        super().copy_trained(read)
        self._revive(drawn)

    def _revive(self, drawn: Tensor) -> None:
        """Give A its drawn rows where it is zero and B is too, as in ranks that maestro has cut: there neither would
        ever get a gradient. B A stays."""
        is_dead = ~self.A.any(1) & ~self.folded().any(0)
        self.A[is_dead] = drawn[is_dead]

    @torch.no_grad()
    def balance(self) -> None:
        """Share the singular values of B A, residual included, evenly between B and A, whose columns and rows become
        orthogonal. B A stays, up to the rounding of its factors.

        From two QR decompositions and the singular values of an (r, r) matrix, in float64: no matrix (out, in) is made.
        A product without full rank is left alone: where both factors are zero nothing would ever be learned again.
        """
        if self.rank == 0:
            return
        left, left_corner = torch.linalg.qr(self._fold(self.B.double()))
        right, right_corner = torch.linalg.qr(self.A.double().t())
        columns, values, rows = torch.linalg.svd(left_corner @ right_corner.t())
        if values[-1] <= 1e-12 * values[0]:  # the rounding of float64
            return
        roots = values.sqrt()
        self.B.copy_(self._fold(left @ (columns * roots), -1))
        self.A.copy_((roots[:, None] * rows) @ right.t())

    @property
    def balance_bytes(self) -> int:
        """What `balance` allocates: both factors in float64, before and after QR, and five (r, r) matrices."""
        return 8 * self.rank * (2 * (self.in_features + self.out_features) + 5 * self.rank)


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a matrix (out, in), with m the smaller side: columns (out, m), values (m,)
    descending and rows (m, in), in float32.

    It is exact (`torch.linalg.svd`): `svd_lowrank` is four times faster, but leaves more of a flat spectrum out (0.64
    instead of 0.61 of a random 2048 x 2048 matrix at rank 512, in 1.0 instead of 3.6 s on one core) and draws from the
    global generator. This is done once a run.
    """
    matrix = weight.detach().float()
    is_wide = matrix.shape[0] < matrix.shape[1]  # a tall matrix is decomposed several times faster
    left, values, right = torch.linalg.svd(matrix.t() if is_wide else matrix, full_matrices=False)
    return (right.t(), values, left.t()) if is_wide else (left, values, right)


def beyond_rank(weight: Tensor, rank: int) -> Tensor:
    """What the nearest matrix of this rank leaves of `weight` (out, in): float32."""
    columns, values, rows = decompose(weight)
    return weight.detach().float() - (columns[:, :rank] * values[:rank]) @ rows[:rank]


def orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A matrix (rows, columns) of orthonormal columns, uniformly distributed: float32, on the CPU. From the QR
    decomposition of a normal matrix, with the signs that make R's diagonal positive (Mezzadri, math-ph/0609050)."""
    drawn = torch.empty(rows, columns, device="cpu").normal_(generator=generator)
    columns_of_q, r = torch.linalg.qr(drawn)
    return columns_of_q * r.diagonal().sign()


def largest_singular_values(out_features: int, in_features: int, count: int) -> Tensor:
    """The expected `count` largest singular values, largest first, of a matrix (out, in) of independent entries with
    variance 1: float64. `count` is at most the smaller side.

    With m <= n the sides and y = m / n, the squares over n have the density sqrt((b - t)(t - a)) / (2 pi y t) on
    [a, b] = [(1 - sqrt(y))^2, (1 + sqrt(y))^2] (Marchenko and Pastur, 1967). The i-th of m is its quantile
    1 - (i + 1/2) / m. With t = 1 + y - 2 sqrt(y) cos(u) the density is smooth in u, even where a is 0.
    """
    m, n = sorted((out_features, in_features))
    y = m / n
    u = torch.linspace(0, math.pi, 1 << 14, dtype=torch.float64)
    t = 1 + y - 2 * math.sqrt(y) * u.cos()
    density = (u.sin() ** 2 / t.clamp_min(1e-300)).nan_to_num()
    if y == 1:  # the limit at u = 0, where both are 0
        density[0] = 1.0
    share = torch.cumulative_trapezoid(density, u)
    share = torch.cat([share.new_zeros(1), share / share[-1]])
    wanted = 1 - (torch.arange(count, dtype=torch.float64) + 0.5) / m
    return (n * t[torch.searchsorted(share, wanted).clamp_max(len(t) - 1)]).sqrt()
