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

Both compute the same up to rounding; cost.py chooses the cheaper. A residual c Expand(h) (residual.py) adds c R A to W,
c R^T dW to dA and c R^T dy to u, in place. Plain autograd would keep a dense W (composed), or an
x S^T beside every h B^T (factored), from forward to backward. Here x, the parameters and h are saved, and the rest
lives inside one call; W and dW never at the same time. Positions are distinct, so a dense S is added by gather and
assignment instead of by atomic additions, whose order (and so whose result) changes from run to run on CUDA. Products
with a dense W are computed on aligned sides (aligned.py). Under autocast the arithmetic and the output have autocast's
dtype, each gradient that of its tensor. Differentiable once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers import sparse
from sltrain.layers.aligned import aligned, aligned_linear, autocast_dtype, cast_to
from sltrain.layers.parts import SparsePart
from sltrain.layers.residual import add_expanded, add_gathered
from sltrain.layers.support import Support

Constants = tuple[Support, float, float]  # the support, the scale and the residual of a Weight


@dataclass
class Weight:
    """The parts of one W, (out, in), and its bias. r = 0 is S alone, nnz = 0 is B A alone."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    values: Tensor  # (nnz,)
    indices: Tensor  # as `support` draws them
    support: Support
    scale: float
    bias: Tensor | None = None  # (out,)
    residual: float = 0.0  # c in y + c Expand(x A^T), see residual.py

    @property
    def S(self) -> SparsePart:
        return SparsePart(self.values, self.indices, self.support)


def compose_weight(weight: Weight) -> Tensor:
    """Dense W, (out, in), in the factors' dtype."""
    dense = weight.B @ (weight.scale * weight.A)
    if weight.residual:
        add_expanded(dense.t(), weight.A.t(), weight.residual)
    flat = dense.view(-1)
    for entries, positions in weight.support.pieces(weight.indices):
        flat.index_put_((positions,), flat.index_select(0, positions) + weight.values[entries])
    return dense


def composed_linear(x: Tensor, weight: Weight) -> Tensor:
    """x (..., in) -> x W^T + bias (..., out), through a dense W."""
    w = weight
    return _Composed.apply(
        x, w.A, w.B, w.values, w.indices, w.bias, (w.support, w.scale, w.residual, autocast_dtype(x))
    )


def factored_linears(x: Tensor, weights: list[Weight]) -> list[Tensor]:
    """x (..., in) -> x W^T + bias (..., out) for each W, through their factors. x is read once for all of them."""
    tensors = [t for w in weights for t in (w.A, w.B, w.values, w.indices, w.bias)]
    constants = [(w.support, w.scale, w.residual) for w in weights]
    return list(_Factored.apply(x, constants, autocast_dtype(x), *tensors))


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, constants: Any
    ) -> Tensor:
        support, scale, residual, cast = constants
        # Without a cast matmul refuses mixed dtypes, as in nn.Linear.
        A_cast, B_cast, values_cast = (cast_to(t, cast) for t in (A, B, values))
        weight = compose_weight(Weight(A_cast, B_cast, values_cast, indices, support, scale, residual=residual))
        y = aligned_linear(cast_to(x, cast), weight, None if bias is None else cast_to(bias, cast))
        needs_weight_grad = any(ctx.needs_input_grad[1:4])
        # The originals are saved, not their casts: parameters are alive anyway, and q, k, v (gate, up) share one x.
        ctx.save_for_backward(x if needs_weight_grad else None, A, B, values, indices)
        ctx.support, ctx.scale, ctx.residual = support, scale, residual
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, indices = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_values, _, needs_bias, _ = ctx.needs_input_grad
        dtype, out_features, in_features = grad_y.dtype, B.shape[0], A.shape[1]
        A_cast, B_cast = A.to(dtype), B.to(dtype)
        rows = aligned(grad_y.reshape(-1, out_features), pad_rows=False)  # (N, out), or a few more columns
        grad_x = grad_A = grad_B = grad_values = grad_bias = None
        if needs_x:
            weight = compose_weight(
                Weight(A_cast, B_cast, values.to(dtype), indices, ctx.support, ctx.scale, residual=ctx.residual)
            )
            grad_x = (rows @ aligned(weight))[:, :in_features].reshape(*grad_y.shape[:-1], in_features)
            grad_x = grad_x.to(ctx.x_dtype)
            del weight  # before dW is allocated
        if needs_A or needs_B or needs_values:
            columns = aligned(x.to(dtype).reshape(-1, in_features), pad_rows=False)
            grad_weight = (rows.t() @ columns)[:out_features, :in_features].contiguous()  # (out, in)
            if needs_A:
                grad_A = ctx.scale * (B_cast.t() @ grad_weight)
                if ctx.residual:
                    add_gathered(grad_A.t(), grad_weight.t(), ctx.residual)
                grad_A = grad_A.to(A.dtype)
            if needs_B:
                grad_B = (grad_weight @ (ctx.scale * A_cast).t()).to(B.dtype)
            if needs_values:
                grad_values, flat = torch.empty_like(values), grad_weight.view(-1)
                for entries, positions in ctx.support.pieces(indices):
                    grad_values[entries] = flat.index_select(0, positions).to(values.dtype)
        if needs_bias:
            grad_bias = rows.sum(0)[:out_features].to(ctx.bias_dtype)
        return grad_x, grad_A, grad_B, grad_values, None, grad_bias, None


class _Factored(torch.autograd.Function):
    """Tensors come flat, five a weight: A, B, values, indices, bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, constants: list[Constants], cast: torch.dtype | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights = _weights(tensors, constants, cast)
        rows = cast_to(x, cast).reshape(-1, x.shape[-1]).contiguous()  # (N, in)
        hidden = rows @ torch.cat([w.A for w in weights]).t()  # (N, sum of ranks)
        ys = []
        products = sparse.forward(rows, [w.S for w in weights])
        for w, h, y in zip(weights, hidden.split([len(w.A) for w in weights], dim=1), products, strict=True):
            y.addmm_(h, (w.scale * w.B).t())
            if w.residual:
                add_expanded(y, h, w.residual)
            ys.append((y if w.bias is None else y.add_(w.bias)).view(*x.shape[:-1], len(w.B)))
        ctx.save_for_backward(x, hidden, *tensors)
        ctx.constants = constants
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *tensors = ctx.saved_tensors
        dtype = grad_ys[0].dtype
        weights = _weights(tensors, ctx.constants, dtype)
        rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
        grads = [grad.reshape(-1, grad.shape[-1]).contiguous() for grad in grad_ys]  # (N, out) each
        grad_x, grad_values = sparse.backward(rows, grads, [w.S for w in weights])
        hiddens = hidden.split([len(w.A) for w in weights], dim=1)
        found: list[Tensor | None] = []
        for w, h, grad, grad_value in zip(weights, hiddens, grads, grad_values, strict=True):
            u = grad @ (w.scale * w.B)  # (N, r)
            if w.residual:
                add_gathered(u, grad, w.residual)
            grad_x.addmm_(u, w.A)
            grad_B = grad.t() @ h
            found += [u.t() @ rows, grad_B.mul_(w.scale), grad_value, None, None if w.bias is None else grad.sum(0)]
        wanted = zip(found, tensors, ctx.needs_input_grad[3:], strict=True)
        result = [g.to(t.dtype) if needs and g is not None else None for g, t, needs in wanted]
        return grad_x.view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None, None, None, *result


def _weights(tensors: Any, constants: list[Constants], cast: torch.dtype | None) -> list[Weight]:
    weights = []
    for number, (support, scale, residual) in enumerate(constants):
        A, B, values, indices, bias = tensors[5 * number : 5 * number + 5]
        bias = None if bias is None else cast_to(bias, cast)
        A, B, values = (cast_to(tensor, cast) for tensor in (A, B, values))
        weights.append(Weight(A, B, values, indices, support, scale, bias, residual))
    return weights
