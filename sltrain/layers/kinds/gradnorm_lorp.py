"""W = m V / |V| with V = W0 + (alpha / rank) B A, row by row: weight normalisation of a low-rank update (GradNormLoRP,
arXiv 2412.19616), and its gradients.

    n_o = |V_o|, the norm of row o;  c = m / n
    dm = (dW . V) / n                           rows multiplied entry by entry and summed
    dV = c (dW - V (dW . V) / n^2)              only what turns a row, not what stretches it
    dA = (alpha / rank) B^T dV,                 dB = (alpha / rank) dV A^T
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sltrain.layers.adapted import AdaptedLinear
from sltrain.layers.aligned import aligned, aligned_linear, autocast_dtype, cast_to
from sltrain.layers.base import Footprint, Rows, cast_bytes, fill_uniform, gradient_bytes
from sltrain.layers.parts import Part


class GradNormLoRPLinear(AdaptedLinear, kind="gradnorm_lorp"):
    """y = x W^T + bias with W = m V / |V|, V = W0 + (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Beside the parameters of AdaptedLinear it has m (out,). A starts uniform in +-1/sqrt(in), B zero and m as the norms
    of W0's rows, so that W starts as W0. A row of W0 that is zero stays zero. V and dW are dense inside a call; nothing
    but x is kept for backward.
    """

    GROUPS = AdaptedLinear.GROUPS | {"m": "magnitude"}

    def prepare(self, like: dict[str, Any], rank: int, alpha: float, **frozen: Any) -> None:
        super().prepare(like, rank, alpha, **frozen)
        self.m = nn.Parameter(self.A.new_empty(self.out_features))

    @torch.no_grad()
    def start_factors(self, generator: torch.Generator | None) -> None:
        fill_uniform(self.A, self.in_features**-0.5, generator)
        self.B.zero_()
        self.m.copy_(row_norms(self.W0))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """W0 is the matrix, m the norms of its rows, and B zero."""
        self.W0.copy_(weight)
        self.B.zero_()
        self.m.copy_(row_norms(self.W0))

    def forward(self, x: Tensor) -> Tensor:
        cast = autocast_dtype(x)
        y: Tensor = _Normalised.apply(x, cast, self.W0, self.A, self.B, self.m, self.scale)
        return y if self.bias is None else y + cast_to(self.bias, cast)

    def parts(self) -> dict[str, Part]:
        return {"W": NormalisedPart(self.W0.detach(), self.A.detach(), self.B.detach(), self.m.detach(), self.scale)}

    def footprint(self, rows: Rows) -> Footprint:
        """V, and beside it c dy or dW; casts."""
        dense = self.W0.numel() * rows.element_size
        beside = max(dense, rows.num_rows * self.out_features * rows.element_size)
        return Footprint(0, dense + beside + cast_bytes([self], rows), gradients=gradient_bytes(self))


@dataclass(frozen=True)
class NormalisedPart(Part):
    """W of W0 (out, in), A (r, in), B (out, r) and m (out,), composed when it is asked for."""

    W0: Tensor
    A: Tensor
    B: Tensor
    m: Tensor
    scale: float
    group = "dense"

    def dense(self) -> Tensor:
        return compose(self.W0, self.A, self.B, self.m, self.scale)

    def norm(self) -> Tensor:
        return self.m.float().norm()  # each row's norm is that of its entry of m


def row_norms(matrix: Tensor) -> Tensor:
    """(out,), at least float32 and above 0, so that rows of zeros can be divided by theirs."""
    exact = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix, dim=1, dtype=exact).clamp_min(1e-12)


def direction(W0: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """V (out, in) in this dtype, and the norms of its rows, (out,)."""
    V = W0.to(dtype, copy=True).addmm_(B.to(dtype), A.to(dtype), alpha=scale)
    return V, row_norms(V)


def compose(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """W (out, in) in this dtype (None: that of A)."""
    V, norms = direction(W0, A, B, scale, dtype or A.dtype)
    return V.mul_((m / norms)[:, None])


class _Normalised(torch.autograd.Function):
    """x (..., in), W0 (out, in), A (r, in), B (out, r), m (out,) -> x W^T (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: torch.dtype | None, *tensors: Any) -> Tensor:
        W0, A, B, m, scale = tensors
        ctx.save_for_backward(x, W0, A, B, m)
        ctx.scale = scale
        return aligned_linear(cast_to(x, cast), compose(W0, A, B, m, scale, cast))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, W0, A, B, m = ctx.saved_tensors
        dtype, (out_features, in_features) = grad_y.dtype, W0.shape
        rows = grad_y.reshape(-1, out_features)
        V, norms = direction(W0, A, B, ctx.scale, dtype)
        factors = (m / norms).to(dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            scaled = aligned(rows * factors, pad_rows=False)
            grad_x = (scaled @ aligned(V))[:, :in_features].reshape(x.shape).to(x.dtype)
            del scaled  # before dW is allocated
        columns = aligned(x.to(dtype).reshape(-1, in_features), pad_rows=False)
        grad = (aligned(rows, pad_rows=False).t() @ columns)[:out_features, :in_features].contiguous()  # dW
        inner = torch.einsum("oi,oi->o", grad, V) / norms
        grad.addcmul_(V, -(inner / norms).to(dtype)[:, None]).mul_(factors[:, None])  # dV
        grad_A = ctx.scale * (B.to(dtype).t() @ grad)
        grad_B = grad @ (ctx.scale * A.to(dtype)).t()
        return grad_x, None, None, grad_A.to(A.dtype), grad_B.to(B.dtype), inner.to(m.dtype), None
