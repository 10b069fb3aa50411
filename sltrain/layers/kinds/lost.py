"""y = gamma B act(A x) + (1 - gamma) V x[columns]: a low-rank product beside whole columns (LOST, arXiv 2508.02668).

Everything starts from one dense random W, as in the authors' code:

    B A       the nearest matrix of rank r to W, its singular values shared evenly by B and A
    columns   the round(sparsity in) columns of the largest norm in what is left of W: in the singular triplets r + 1 to
              r + `complement`, or in all after r
    V         these columns of W

With W W^T = U diag(s^2) U^T the rows of U^T W are s_i times the right singular vectors, so the columns' norms in some
triplets are those of these rows. One symmetric eigendecomposition of the shorter side is all it takes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sltrain.layers.activated import NONE, activated_linear, check_activation
from sltrain.layers.aligned import aligned_linear, autocast_dtype, cast_to
from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.factors import FactoredLinear
from sltrain.layers.parts import Part, SparsePart
from sltrain.layers.support import make_support


class LOSTLinear(FactoredLinear, kind="lost"):
    """y = gamma act(x A^T) B^T + (1 - gamma) x[..., columns] V^T + bias; x (..., in_features) -> (..., out_features).

    Parameters A (rank, in), B (out, rank), values (V row after row), bias (out,) or None; buffer indices, the columns.
    `init_std` is the standard deviation of the dense start. With an activation, one of ACTIVATIONS
    (layers/activated.py), there is no W. Raises ValueError for a rank outside [1, min(in, out)], a sparsity that is no
    column, a gamma outside (0, 1), a complement below 1 and an unknown activation.
    """

    CODE = "_lost_code.py"
    GROUPS = FactoredLinear.GROUPS | {"values": "sparse", "indices": "indices"}

    indices: Tensor

    def prepare(
        self,
        like: dict[str, Any],
        rank: int,
        sparsity: float,
        gamma: float = 0.5,
        activation: str = NONE,
        complement: int | None = None,
    ) -> None:
        if not 0 < gamma < 1:
            raise ValueError(f"gamma is {gamma}; it must be above 0 and below 1, the share of the low-rank product")
        self.make_factors(like, rank, gamma * rank)
        if complement is not None and complement < 1:
            raise ValueError(f"complement is {complement}; at least one singular triplet must choose the columns")
        if 0 <= sparsity < 0.5 / self.in_features:
            least = f"{1 / self.in_features:.2g}"
            raise ValueError(f"sparsity {sparsity} trains no column of {self.in_features}; use {least} or more")
        check_activation(activation)
        self.support = make_support(self.out_features, self.in_features, sparsity, "column")
        self.gamma, self.activation, self.complement = gamma, activation, complement
        self.is_mergeable = activation == NONE
        self.values = nn.Parameter(torch.empty(self.support.num_nonzero, **like))
        self.register_buffer("indices", self.values.new_empty(self.support.num_indices, dtype=torch.int32))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self._start(self.drawn_weight(generator).to(self.A.device), 1.0)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """gamma B A is the nearest matrix of its rank, and W is exact in the columns that are chosen. Raises ValueError
        with an activation."""
        self.check_mergeable()
        self._start(weight.detach().float(), self.gamma)
        left = weight.detach().float() - self.gamma * (self.B.float() @ self.A.float())
        self.values.copy_(left[:, self.indices.long()].flatten() / (1 - self.gamma))

    def _start(self, weight: Tensor, scale: float) -> None:
        """scale B A: the nearest matrix to `weight`, (out, in) float32; the columns by the rest of it, and their
        values, on the device of `weight`."""
        is_wide = self.out_features < self.in_features
        matrix = weight if is_wide else weight.t()  # (m, n), m the shorter side
        squares, vectors = torch.linalg.eigh(matrix @ matrix.t())
        squares, vectors = squares.flip(0), vectors.flip(1)  # the largest first
        roots = (squares[: self.rank].clamp(min=1e-30).sqrt() / scale).sqrt()  # of s_i / scale
        near, far = vectors[:, : self.rank] * roots, vectors[:, : self.rank].t() @ matrix / (scale * roots[:, None])
        self.B.copy_(near if is_wide else far.t())
        self.A.copy_(far if is_wide else near.t())
        last = len(squares) if self.complement is None else self.rank + self.complement
        rest = vectors[:, self.rank : last]
        rows = rest.t() @ matrix if is_wide else squares[self.rank : last, None].clamp(min=0).sqrt() * rest.t()
        largest = rows.square().sum(0).topk(self.support.num_indices).indices
        self.indices.copy_(largest.sort().values)
        self.values.copy_(weight[:, self.indices.long()].flatten())

    def forward(self, x: Tensor) -> Tensor:
        hidden = aligned_linear(x, self.A)
        y = activated_linear(hidden, self.B, self.bias, self.activation, self.gamma)
        return y + _Columns.apply(x, self.values, self.indices, self.support, 1 - self.gamma, autocast_dtype(x))

    def parts(self) -> dict[str, Part]:
        values = (1 - self.gamma) * self.values.detach()
        return super().parts() | {"S": SparsePart(values, self.indices, self.support)}

    def settings(self) -> dict[str, Any]:
        own = {"gamma": self.gamma, "activation": self.activation, "complement": self.complement}
        return {"rank": self.rank, "sparsity": self.support.sparsity, **own}

    def multiply_adds(self) -> int:
        return super().multiply_adds() + self.support.num_nonzero

    def footprint(self, rows: Rows) -> Footprint:
        """h = x A^T is kept; z, its gradient, the chosen columns, the second y and a second gradient of x are not."""
        hidden = rows.num_rows * self.rank * rows.element_size
        wide = rows.num_rows * max(self.in_features, self.out_features) * rows.element_size
        columns = self.support.temporary_bytes(rows.num_rows, rows.element_size)
        return Footprint(hidden, hidden + wide + columns + 2 * cast_bytes([self], rows), gradient_bytes(self))

    def warnings(self) -> dict[str, str]:
        most, limit = self.support.num_indices, min(self.in_features, self.out_features)
        line = f"method=lost: W has rank at most rank + columns (the first layer: {self.rank} + {most} of {limit})"
        return {"columns": line} if self.is_mergeable else {}


class _Columns(torch.autograd.Function):
    """x (..., in) -> factor x S^T (..., out), of which nothing but x is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, indices: Tensor, support: Any, factor: float, cast: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.support, ctx.factor = support, factor
        rows = cast_to(x, cast).reshape(-1, x.shape[-1])
        y = support.forward(rows, indices, factor * cast_to(values, cast))
        return y.view(*x.shape[:-1], support.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        rows = x.to(grad_y.dtype).reshape(-1, x.shape[-1])
        grad_x = torch.zeros_like(rows)
        scaled = ctx.factor * values.to(grad_y.dtype)
        grad = grad_y.reshape(-1, grad_y.shape[-1])
        grad_values = ctx.support.backward(rows, grad, indices, scaled, grad_x).mul_(ctx.factor).to(values.dtype)
        return grad_x.view(x.shape).to(x.dtype), grad_values, None, None, None, None
