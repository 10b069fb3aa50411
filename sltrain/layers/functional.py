"""y = x W^T for W = scale * B A + S, without keeping a dense matrix between forward and backward.

    N rows of input, in and out features, rank r, nnz trained entries of S at flat positions `indices`

    forward    W = scale * B A,  W[indices] += values,  y = x W^T                   (Algorithm 1 of arXiv 2406.02214)
    backward   dx = dy W         W is built again: an (out, r) x (r, in) product, r/N of the cost of y
               dW = dy^T x       formed once, then projected:
               dA = scale * B^T dW,   dB = scale * dW A^T,   dvalues = dW[indices]

Plain autograd would keep the dense W of every layer from forward to backward, which is the memory the method sets out
to save. This function saves x, A, B, values and indices; W and dW live only inside one call, and never at the same
time. Positions are distinct, so S is added by gather and assignment instead of by atomic additions, whose order (and so
whose result) changes from run to run on CUDA.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def compose_weight(A: Tensor, B: Tensor, values: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Dense W = scale * B A + S, (out, in), in the factors' dtype.

    A (r, in), B (out, r), values (nnz,), indices (nnz,) distinct flat positions; r and nnz may be 0.
    """
    weight = B @ (scale * A)
    flat = weight.view(-1)
    flat.index_put_((indices,), flat.index_select(0, indices) + values)
    return weight


def sltrain_linear(
    x: Tensor, A: Tensor, B: Tensor, values: Tensor, indices: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """x (..., in) -> (..., out), as F.linear with W = scale * B A + S.

    A (r, in), B (out, r), values (nnz,), indices (nnz,) distinct flat positions, bias (out,). r = 0 leaves S alone,
    nnz = 0 leaves B A alone. Under autocast the arithmetic and the output have autocast's dtype, each gradient that
    of its tensor. Differentiable once.
    """
    return _SLTrainLinear.apply(x, A, B, values, indices, bias, scale, _autocast_dtype(x))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast computes x W^T in; None without autocast, and for float64, which autocast leaves alone."""
    device_type = x.device.type
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


class _SLTrainLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        values: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        scale: float,
        cast: torch.dtype | None,
    ) -> Tensor:
        # Without a cast mixed dtypes are left for matmul to refuse, as in nn.Linear.
        weight = compose_weight(_to(A, cast), _to(B, cast), _to(values, cast), indices, scale)
        y = F.linear(_to(x, cast), weight, None if bias is None else _to(bias, cast))
        needs_weight_grad = any(ctx.needs_input_grad[1:4])
        # The originals are saved, not their casts: parameters are alive anyway, and q, k, v (gate, up) share one x.
        ctx.save_for_backward(x if needs_weight_grad else None, A, B, values, indices)
        ctx.scale, ctx.x_dtype, ctx.bias_dtype = scale, x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, indices = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_values, _, needs_bias, _, _ = ctx.needs_input_grad
        dtype, out_features, in_features = grad_y.dtype, B.shape[0], A.shape[1]
        A_cast, B_cast = A.to(dtype), B.to(dtype)
        rows = grad_y.reshape(-1, out_features)  # (N, out)
        grad_x = grad_A = grad_B = grad_values = grad_bias = None
        if needs_x:
            weight = compose_weight(A_cast, B_cast, values.to(dtype), indices, ctx.scale)
            grad_x = (rows @ weight).view(*grad_y.shape[:-1], in_features).to(ctx.x_dtype)
            del weight  # before dW is made
        if needs_A or needs_B or needs_values:
            grad_weight = rows.t() @ x.to(dtype).reshape(-1, in_features)  # (out, in)
            if needs_A:
                grad_A = (ctx.scale * (B_cast.t() @ grad_weight)).to(A.dtype)
            if needs_B:
                grad_B = (grad_weight @ (ctx.scale * A_cast).t()).to(B.dtype)
            if needs_values:
                grad_values = grad_weight.view(-1).index_select(0, indices).to(values.dtype)
        if needs_bias:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_values, None, grad_bias, None, None


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
