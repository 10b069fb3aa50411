"""y = x W^T for W = scale * B A + S, without keeping a dense matrix between forward and backward, in two ways.

    N rows of input, in and out features, rank r, nnz trained entries of S

    composed   W = scale * B A + S,   y = x W^T                    (Algorithm 1 of arXiv 2406.02214)
               dx = dy W              W is built again: an (out, r) x (r, in) product, r/N of the cost of y
               dW = dy^T x            formed once, then projected:
               dA = scale * B^T dW,   dB = scale * dW A^T,   dvalues = dW at the trained positions
               multiply-adds          3 N in out + 4 r in out

    factored   h = x A^T,             y = scale * h B^T + x S^T
               u = scale * dy B,      dx = u A + dy S
               dA = u^T x,            dB = scale * dy^T h,        dvalues = (dy^T x) at the trained positions
               multiply-adds          3 N r (in + out) + 3 N nnz, and h (N, r) is kept for backward

Both compute the same up to rounding; cost.py says which is cheaper. Plain autograd would keep a dense W (composed), or
an x S^T beside every h B^T (factored), from forward to backward. Here x, the parameters and h are saved and everything
else lives inside one call; W and dW never at the same time. Positions are distinct, so a dense S is added by gather and
assignment instead of by atomic additions, whose order (and so whose result) changes from run to run on CUDA.

Matrix units read rows in pieces of 16 bytes and are slow on matrices whose sides do not divide into them, such as the
5461 of LLaMA 1B. On CUDA such sides are filled up with zeros inside the products with a dense matrix, composed or of a
dense layer; nothing filled up is kept for backward.

Under autocast the arithmetic and the output have autocast's dtype, each gradient that of its tensor. Differentiable
once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers import sparse
from sltrain.layers.sparse import Sparse
from sltrain.layers.support import Support


@dataclass
class Weight:
    """The parts of one W, (out, in): A (r, in), B (out, r), values (nnz,), indices as `support` draws them, and the
    bias (out,) or None that goes with it. r = 0 leaves S alone, nnz = 0 leaves B A alone."""

    A: Tensor
    B: Tensor
    values: Tensor
    indices: Tensor
    support: Support
    scale: float
    bias: Tensor | None = None


def alignment(tensor: Tensor) -> int:
    """Entries that the sides of matrices of this kind should be a multiple of; 1 where it makes no difference."""
    return 16 // tensor.element_size() if tensor.is_cuda and tensor.element_size() < 4 else 1


def _aligned(matrix: Tensor) -> Tensor:
    """A matrix filled up with zeros to aligned sides; itself if it has them."""
    multiple = alignment(matrix)
    missing_rows, missing_columns = -matrix.shape[0] % multiple, -matrix.shape[1] % multiple
    return F.pad(matrix, (0, missing_columns, 0, missing_rows)) if missing_rows or missing_columns else matrix


def _aligned_columns(matrix: Tensor) -> Tensor:
    missing = -matrix.shape[1] % alignment(matrix)
    return F.pad(matrix, (0, missing)) if missing else matrix


def aligned_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out), computed on aligned sides."""
    multiple = alignment(weight)
    if weight.shape[0] % multiple == 0 and weight.shape[1] % multiple == 0:
        return F.linear(x, weight, bias)
    return _AlignedLinear.apply(x, weight, bias, _autocast_dtype(x))


def compose_weight(weight: Weight) -> Tensor:
    """Dense W, (out, in), in the factors' dtype."""
    dense = weight.B @ (weight.scale * weight.A)
    flat = dense.view(-1)
    for entries, positions in weight.support.pieces(weight.indices):
        flat.index_put_((positions,), flat.index_select(0, positions) + weight.values[entries])
    return dense


def composed_linear(x: Tensor, weight: Weight) -> Tensor:
    """x (..., in) -> x W^T + bias (..., out), through a dense W."""
    w = weight
    return _Composed.apply(x, w.A, w.B, w.values, w.indices, w.bias, w.support, w.scale, _autocast_dtype(x))


def factored_linears(x: Tensor, weights: list[Weight]) -> list[Tensor]:
    """x (..., in) -> x W^T + bias (..., out) for each W, through their factors. x is read once for all of them."""
    tensors = [t for w in weights for t in (w.A, w.B, w.values, w.indices, w.bias)]
    constants = [(w.support, w.scale) for w in weights]
    return list(_Factored.apply(x, constants, _autocast_dtype(x), *tensors))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast computes x W^T in; None without autocast, and for float64, which autocast leaves alone."""
    device_type = x.device.type
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cast: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = _aligned_columns(_to(x, cast).reshape(-1, x.shape[-1]))
        y = (rows @ _aligned(_to(weight, cast)).t())[:, : len(weight)].unflatten(0, x.shape[:-1])
        return y if bias is None else y.add_(_to(bias, cast))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        out_features, in_features = weight.shape
        rows = _aligned_columns(grad_y.reshape(-1, out_features))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ _aligned(weight.to(grad_y.dtype)))[:, :in_features].reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            columns = _aligned_columns(x.to(grad_y.dtype).reshape(-1, in_features))
            grad_weight = (rows.t() @ columns)[:out_features, :in_features].contiguous().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)[:out_features].to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        values: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        support: Support,
        scale: float,
        cast: torch.dtype | None,
    ) -> Tensor:
        # Without a cast mixed dtypes are left for matmul to refuse, as in nn.Linear.
        weight = compose_weight(Weight(_to(A, cast), _to(B, cast), _to(values, cast), indices, support, scale))
        y = aligned_linear(_to(x, cast), weight, None if bias is None else _to(bias, cast))
        needs_weight_grad = any(ctx.needs_input_grad[1:4])
        # The originals are saved, not their casts: parameters are alive anyway, and q, k, v (gate, up) share one x.
        ctx.save_for_backward(x if needs_weight_grad else None, A, B, values, indices)
        ctx.support, ctx.scale = support, scale
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, indices = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_values, _, needs_bias, *_ = ctx.needs_input_grad
        dtype, out_features, in_features = grad_y.dtype, B.shape[0], A.shape[1]
        A_cast, B_cast = A.to(dtype), B.to(dtype)
        rows = _aligned_columns(grad_y.reshape(-1, out_features))  # (N, out), or a few more
        grad_x = grad_A = grad_B = grad_values = grad_bias = None
        if needs_x:
            weight = compose_weight(Weight(A_cast, B_cast, values.to(dtype), indices, ctx.support, ctx.scale))
            grad_x = (rows @ _aligned(weight))[:, :in_features].reshape(*grad_y.shape[:-1], in_features)
            grad_x = grad_x.to(ctx.x_dtype)
            del weight  # before dW is made
        if needs_A or needs_B or needs_values:
            columns = _aligned_columns(x.to(dtype).reshape(-1, in_features))
            grad_weight = (rows.t() @ columns)[:out_features, :in_features].contiguous()  # (out, in)
            if needs_A:
                grad_A = (ctx.scale * (B_cast.t() @ grad_weight)).to(A.dtype)
            if needs_B:
                grad_B = (grad_weight @ (ctx.scale * A_cast).t()).to(B.dtype)
            if needs_values:
                grad_values, flat = torch.empty_like(values), grad_weight.view(-1)
                for entries, positions in ctx.support.pieces(indices):
                    grad_values[entries] = flat.index_select(0, positions).to(values.dtype)
        if needs_bias:
            grad_bias = rows.sum(0)[:out_features].to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_values, None, grad_bias, None, None, None


class _Factored(torch.autograd.Function):
    """Tensors come flat, five a weight: A, B, values, indices, bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, constants: list[tuple[Support, float]], cast: torch.dtype | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights = _unflatten(tensors, constants, cast)
        rows = _to(x, cast).reshape(-1, x.shape[-1]).contiguous()  # (N, in)
        hidden = rows @ torch.cat([w.A for w in weights]).t()  # (N, sum of ranks)
        ys = []
        products = sparse.forward(rows, [_sparse(w) for w in weights])
        for w, h, y in zip(weights, hidden.split([len(w.A) for w in weights], dim=1), products, strict=True):
            y.addmm_(h, (w.scale * w.B).t())
            ys.append((y if w.bias is None else y.add_(w.bias)).view(*x.shape[:-1], len(w.B)))
        ctx.save_for_backward(x, hidden, *tensors)
        ctx.constants = constants
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *tensors = ctx.saved_tensors
        dtype = grad_ys[0].dtype
        weights = _unflatten(tensors, ctx.constants, dtype)
        rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        grads = [grad.reshape(-1, grad.shape[-1]).contiguous() for grad in grad_ys]  # (N, out) each
        grad_x, grad_values = sparse.backward(rows, grads, [_sparse(w) for w in weights])
        result: list[Tensor | None] = []
        hiddens = hidden.split([len(w.A) for w in weights], dim=1)
        for w, h, grad, grad_value, original in zip(
            weights, hiddens, grads, grad_values, zip(*[iter(tensors)] * 5, strict=True), strict=True
        ):
            u = grad @ (w.scale * w.B)  # (N, r)
            grad_x.addmm_(u, w.A)
            grad_B = grad.t() @ h
            own = (u.t() @ rows, grad_B.mul_(w.scale), grad_value, None, None if w.bias is None else grad.sum(0))
            result += [None if g is None else g.to(t.dtype) for g, t in zip(own, original, strict=True)]
        needed = ctx.needs_input_grad[3:]
        result = [g if needs else None for g, needs in zip(result, needed, strict=True)]
        return grad_x.view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None, None, None, *result


def _unflatten(tensors: Any, constants: list[tuple[Support, float]], cast: torch.dtype | None) -> list[Weight]:
    weights = []
    for (A, B, values, indices, bias), (support, scale) in zip(
        zip(*[iter(tensors)] * 5, strict=True), constants, strict=True
    ):
        bias = None if bias is None else _to(bias, cast)
        weights.append(Weight(_to(A, cast), _to(B, cast), _to(values, cast), indices, support, scale, bias))
    return weights


def _sparse(weight: Weight) -> Sparse:
    return Sparse(weight.support, weight.indices, weight.values)


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
