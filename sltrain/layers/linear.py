"""Linear layers that train fewer values than their matrix has.

    SLTrainLinear    W = (alpha / rank) B A + S    A (rank, in), B (out, rank), S on a fixed support (arXiv 2406.02214)
    LowRankLinear    W = (alpha / rank) B A        the paper's low-rank baseline
    AlignedLinear    W                             nn.Linear for sides that matrix units do not like

    tensor   start                                             source
    A        uniform in +-1/sqrt(in)                           Kaiming-uniform with a = sqrt(5), as torch's nn.Linear
    B        zero, when there is an S                          the paper: training starts from W = S
             uniform, when there is none                       see below
    values   uniform in +-1/sqrt(in)                           the paper
    bias     uniform in +-1/sqrt(in)                           nn.Linear

Without S a zero B makes W zero. Zero query, key, value and output projections pass no gradient to each other, so a
model made of them never starts to learn. B is then uniform with the standard deviation 1/(scale * sqrt(rank)), which
gives the entries of scale * B A the variance of nn.Linear's, 1/(3 in).

Random numbers are drawn on the CPU in float32 and copied, so one generator gives one layer on every device and dtype.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sltrain.layers.functional import Weight, aligned_linear, compose_weight, composed_linear, factored_linears
from sltrain.layers.sparse import Sparse, can_share
from sltrain.layers.support import Support

PATHS = ("composed", "factored")  # how W x is computed: see functional.py
DRAWN_AT_ONCE = 2**22  # random numbers


class FactoredLinear(nn.Module):
    """What both layers share: the factors A and B, an optional bias, their start and norms. Not a layer by itself."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        limit = min(in_features, out_features)
        if not 0 <= rank <= limit:
            raise ValueError(
                f"rank must be between 0 and {limit} for a {out_features} x {in_features} matrix, got {rank}"
            )
        if rank > 0 and not alpha > 0:
            raise ValueError(f"alpha must be above 0 (the low-rank product is scaled by alpha / rank), got {alpha}")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank if rank else 0.0
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def num_low_rank(self) -> int:
        """Trained values in A and B."""
        return self.A.numel() + self.B.numel()

    @property
    def num_sparse(self) -> int:
        """Trained values in S."""
        return 0

    @torch.no_grad()
    def low_rank_norm(self) -> Tensor:
        """Frobenius norm of scale * B A, 0-d float32. |B A|^2 = sum of (B^T B) * (A A^T), two (rank, rank) matrices."""
        A, B = self.A.float(), self.B.float()
        square = ((B.t() @ B) * (A @ A.t())).sum()
        return self.scale * square.clamp(min=0).sqrt()  # rounding can take a tiny square below 0

    @torch.no_grad()
    def sparse_norm(self) -> Tensor:
        """Frobenius norm of S, 0-d float32."""
        return torch.zeros((), device=self.A.device)

    def _reset_factors(self, generator: torch.Generator | None) -> None:
        """Fill A, B and the bias by the table at the top."""
        bound = 1 / math.sqrt(self.in_features)
        _fill_uniform(self.A, bound, generator)
        if self.num_sparse == 0:
            # uniform in +-b has the variance b^2 / 3
            _fill_uniform(self.B, math.sqrt(3 / self.rank) / self.scale, generator)
        else:
            nn.init.zeros_(self.B)
        if self.bias is not None:
            _fill_uniform(self.bias, bound, generator)


class SLTrainLinear(FactoredLinear):
    """y = x W^T + bias with W = (alpha / rank) B A + S; x (..., in_features) -> (..., out_features).

    `sparsity` is the paper's delta, the fraction of the entries of S that are trained. rank = 0 trains S alone,
    sparsity = 0 trains B A alone. `support` and `block_size` say where the entries lie (support.py), `path` how the
    product is computed (functional.py); it changes rounding, not the function, and may be set at any time. The layer is
    ready after construction; on the meta device only shapes exist, and `reset_parameters` fills the layer after
    `to_empty(device=...)`. `generator` is a CPU generator (None: torch's default one).

    Parameters A (rank, in), B (out, rank), values (nnz,), bias (out,) or None; buffer indices, as support.py draws
    them. Raises ValueError for a rank outside [0, min(in, out)], a sparsity or block size that the support cannot have,
    and where nothing is left to train.
    """

    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparsity: float,
        alpha: float,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        support: str = "uniform",
        block_size: int | None = None,
        path: str = "composed",
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, bias, device, dtype)
        if path not in PATHS:
            raise ValueError(f"unknown path {path!r}: choose one of {', '.join(PATHS)}")
        self.support = Support(out_features, in_features, sparsity, support, block_size)
        self.path = path
        nnz = self.support.num_nonzero
        if rank == 0 and nnz == 0:
            raise ValueError(
                f"rank {rank} and sparsity {sparsity} leave nothing to train in a {out_features} x {in_features} "
                "matrix; raise one of them"
            )
        self.values = nn.Parameter(torch.empty(nnz, device=device, dtype=dtype))
        indices = torch.empty(self.support.num_indices, device=device, dtype=self.support.index_dtype)
        self.register_buffer("indices", indices)
        if not self.values.is_meta:
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the support and every parameter anew."""
        self.indices.copy_(self.support.draw(generator))
        self._reset_factors(generator)
        _fill_uniform(self.values, 1 / math.sqrt(self.in_features), generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.path == "composed":
            return composed_linear(x, self._weight)
        return factored_linears(x, [self._weight])[0]

    @staticmethod
    def forward_together(x: Tensor, layers: "Sequence[SLTrainLinear]") -> list[Tensor]:
        """The output of each layer for the same x, which factored layers read once for all. These are not called one by
        one then, so their forward hooks do not run."""
        sparses = [Sparse(layer.support, layer.indices, layer.values) for layer in layers]
        if all(layer.path == "factored" for layer in layers) and can_share(sparses):
            return factored_linears(x, [layer._weight for layer in layers])
        return [layer(x) for layer in layers]

    @property
    def _weight(self) -> Weight:
        return Weight(self.A, self.B, self.values, self.indices, self.support, self.scale, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W, (out, in), detached: what nn.Linear would hold."""
        return compose_weight(self._weight)

    @property
    def num_sparse(self) -> int:
        return self.values.numel()

    @torch.no_grad()
    def sparse_norm(self) -> Tensor:
        return self.values.float().norm()

    def extra_repr(self) -> str:
        s = self.support
        blocks = f", block_size={s.block}" if s.kind == "block" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"sparsity={s.sparsity}, alpha={self.alpha}, bias={self.bias is not None}, "
            f"support={s.kind}{blocks}, path={self.path}"
        )


class LowRankLinear(FactoredLinear):
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
        super().__init__(in_features, out_features, rank, alpha, bias, device, dtype)
        if rank == 0:
            raise ValueError("a low-rank layer needs a rank of at least 1, got 0")
        if not self.A.is_meta:
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter anew."""
        self._reset_factors(generator)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale * aligned_linear(x, self.A)  # (..., rank); a scaled B would be kept for backward
        return aligned_linear(hidden, self.B, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W, (out, in), detached: what nn.Linear would hold."""
        return self.B @ (self.scale * self.A)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, alpha={self.alpha}, "
            f"bias={self.bias is not None}"
        )


class AlignedLinear(nn.Linear):
    """nn.Linear whose product is computed on sides that matrix units like; the parameters stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return aligned_linear(x, self.weight, self.bias)


def _fill_uniform(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Pieces of a sequence of numbers: the values are those of drawing all at once, without a second copy of all."""
    for piece in parameter.view(-1).split(DRAWN_AT_ONCE):
        drawn = torch.empty(len(piece), dtype=torch.float32, device="cpu")
        piece.copy_(drawn.uniform_(-bound, bound, generator=generator))
