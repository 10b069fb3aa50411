"""W = U diag(s) V of full rank, of which all singular values and a few singular vectors are trained (Sparse Spectral
Training, Zhao et al., arXiv 2405.15481, section 4).

With G = dL/dW, u a column of U and v the row of V that belongs to it, s has the gradient u^T G v^T, but u has G v^T and
v has (G^T u)^T: equation 8 leaves the factor s out, so that a direction is learned at one rate however small its
singular value is. Two pairs of tensors give gradients and moments to the trained vectors alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sltrain.layers.aligned import autocast_dtype, cast_to
from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.factors import largest_singular_values, orthonormal
from sltrain.layers.parts import LowRankPart, Part
from sltrain.layers.started import StartedLinear


class SpectralLinear(StartedLinear, kind="sst"):
    """y = x W^T + bias with W = U diag(s) V; x (..., in_features) -> (..., out_features).

    With m = min(in, out): parameters U (out, rank), V (rank, in), s (m,), bias (out,) or None; frozen U_rest
    (out, m - rank), V_rest (m - rank, in); buffer order (m,), whose first `rank` entries are the places in s of the
    trained vectors. Raises ValueError for a rank outside [1, m].
    """

    GROUPS = dict(U="low_rank", V="low_rank", s="singular", U_rest="frozen", V_rest="frozen", order="indices")
    CODE = "_sst_code.py"

    order: Tensor

    def prepare(self, like: dict[str, Any], rank: int) -> None:
        self.check_rank(rank)
        self.rank, self.full_rank = rank, min(self.in_features, self.out_features)
        rest = self.full_rank - rank
        self.U = nn.Parameter(torch.empty(self.out_features, rank, **like))
        self.s = nn.Parameter(torch.empty(self.full_rank, **like))
        self.V = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.U_rest = nn.Parameter(torch.empty(self.out_features, rest, **like), requires_grad=False)
        self.V_rest = nn.Parameter(torch.empty(rest, self.in_features, **like), requires_grad=False)
        self.register_buffer("order", self.s.new_empty(self.full_rank, dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the singular values and vectors of a random matrix of standard deviation `init_std`, and the order."""
        self.s.copy_(self.init_std * largest_singular_values(self.out_features, self.in_features, self.full_rank))
        left = orthonormal(self.out_features, self.full_rank, generator)
        right = orthonormal(self.in_features, self.full_rank, generator).t()
        self._place(left, right, self._sample(generator))
        self.reset_bias(generator)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """W itself, up to rounding; the vectors of the largest singular values are trained first."""
        left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        self.s.copy_(values)
        self._place(left, right, torch.arange(self.full_rank))

    def forward(self, x: Tensor) -> Tensor:
        tensors = self.U, self.s, self.V, self.U_rest, self.V_rest, self.order
        y: Tensor = _Spectral.apply(x, autocast_dtype(x), *tensors)
        return y if self.bias is None else y + cast_to(self.bias, y.dtype)

    @torch.no_grad()
    def tidy(self) -> None:
        """Give the trained vectors length one, and take negative singular values to 0."""
        self.U.div_(self.U.norm(dim=0, keepdim=True).clamp_min(1e-12))
        self.V.div_(self.V.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.s.clamp_(min=0)

    @torch.no_grad()
    def select(self, generator: torch.Generator | None) -> None:
        """Train other vectors: `rank` of all, drawn without replacement from a CPU generator, the i-th with the weight
        (1 / m + s_i / sum of s) / 2 (section 4.4). No number of W's changes."""
        back = self.order.argsort()
        left, right = torch.cat([self.U, self.U_rest], 1)[:, back], torch.cat([self.V, self.V_rest])[back]
        self._place(left, right, self._sample(generator))

    @torch.no_grad()
    def decompose(self) -> None:
        """Make U, s and V the singular value decomposition of W again; W stays, up to the rounding of its factors."""
        self.set_weight(self.dense_weight())

    @property
    def select_bytes(self) -> int:
        """Of `select` and `decompose`: W, and in float64 W twice and both sides of its decomposition. LAPACK's own
        memory, with MKL three (m, m) matrices, is in no plan."""
        size, sides = self.out_features * self.in_features, self.out_features + self.in_features
        return self.U.element_size() * size + 8 * (2 * size + self.full_rank * sides)

    def _sample(self, generator: torch.Generator | None) -> Tensor:
        values = self.s.detach().double().cpu()
        weights = 1 / self.full_rank + values / values.sum().clamp_min(1e-300)
        is_rest = torch.ones(self.full_rank, dtype=torch.uint8)
        is_rest[torch.multinomial(weights, self.rank, generator=generator)] = 0
        return is_rest.argsort(stable=True)

    def _place(self, left: Tensor, right: Tensor, order: Tensor) -> None:
        """Store all vectors, columns of `left` and rows of `right` in the order of s, as `order` says."""
        self.order.copy_(order)
        own = order.to(left.device)
        self.U.copy_(left[:, own[: self.rank]])
        self.U_rest.copy_(left[:, own[self.rank :]])
        self.V.copy_(right[own[: self.rank]])
        self.V_rest.copy_(right[own[self.rank :]])

    def parts(self) -> dict[str, Part]:
        trained, frozen = self.s.detach()[self.order].split([self.rank, self.full_rank - self.rank])
        return {
            "trained": LowRankPart(self.U.detach() * trained, self.V.detach()),
            "frozen": LowRankPart(self.U_rest.detach() * frozen, self.V_rest.detach()),
        }

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def multiply_adds(self) -> int:
        return self.full_rank * (self.in_features + self.out_features)

    def footprint(self, rows: Rows) -> Footprint:
        """x V^T of all vectors is kept; dy U and its product with s are temporary."""
        hidden = rows.num_rows * self.full_rank * rows.element_size
        everything = sum(p.numel() for p in self.parameters()) * rows.element_size
        cast = everything if self.U.element_size() > rows.element_size else 0
        return Footprint(hidden, 2 * hidden + cast + cast_bytes([self], rows), gradients=gradient_bytes(self))


class _Spectral(torch.autograd.Function):
    """x (..., in), U (out, r), s (m,), V (r, in), U_rest (out, m - r), V_rest (m - r, in), order (m,) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: torch.dtype | None, *tensors: Tensor) -> Tensor:
        U, s, V, U_rest, V_rest, order = tensors
        rows = cast_to(x, cast).reshape(-1, x.shape[-1])
        values = cast_to(s, cast)[order]
        hidden, hidden_rest = (rows @ cast_to(right, cast).t() for right in (V, V_rest))
        ctx.save_for_backward(x, hidden, hidden_rest, *tensors)
        y = (hidden * values[: len(V)]) @ cast_to(U, cast).t()
        y.addmm_(hidden_rest * values[len(V) :], cast_to(U_rest, cast).t())
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, hidden_rest, U, s, V, U_rest, V_rest, order = ctx.saved_tensors
        dtype, rank = grad_y.dtype, len(V)
        rows, grad = x.to(dtype).reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        values = s.to(dtype)[order]
        back = grad @ U.to(dtype)  # (N, r)
        grad_U, grad_V = grad.t() @ hidden, back.t() @ rows
        grad_s = torch.empty_like(values)
        grad_s[order[:rank]] = (back * hidden).sum(0)
        grad_x = back.mul_(values[:rank]) @ V.to(dtype)
        back = grad @ U_rest.to(dtype)
        grad_s[order[rank:]] = (back * hidden_rest).sum(0)
        grad_x.addmm_(back.mul_(values[rank:]), V_rest.to(dtype))
        trained = grad_U.to(U.dtype), grad_s.to(s.dtype), grad_V.to(V.dtype)
        return grad_x.view(x.shape).to(x.dtype), None, *trained, None, None, None
