"""y = z W^T + c Expand(z) with z = scale act(h): the second half of a projection with an activation between its factors
or a fixed residual, or both, which keeps h alone for backward.

Autograd would keep h for the activation and z for the product. Here z, (N, r), is computed again in backward, which
costs no product. Expand (residual.py) adds to y in place, so that no second y exists. Differentiable once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers.aligned import aligned, aligned_linear
from sltrain.layers.residual import add_expanded, add_gathered

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
NONE = "none"


def check_activation(name: str) -> None:
    """Raise ValueError for a name that is neither one of ACTIVATIONS nor `none`."""
    if name not in (*ACTIVATIONS, NONE):
        raise ValueError(f"activation is {name!r}; choose one of {', '.join([*ACTIVATIONS, NONE])}")


def activated_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = NONE,
    scale: float = 1.0,
    residual: float = 0.0,
) -> Tensor:
    """hidden (..., r), weight (out, r), bias (out,) -> z weight^T + residual Expand(z) + bias, (..., out), with
    z = scale act(hidden). Activation `none` is the identity."""
    if activation == NONE and residual == 0:
        return aligned_linear(hidden if scale == 1 else scale * hidden, weight, bias)

    def act(h: Tensor) -> Tensor:
        h = ACTIVATIONS[activation](h) if activation in ACTIVATIONS else h
        return h if scale == 1 else scale * h

    return _ActivatedLinear.apply(hidden, weight, bias, act, residual)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, act: Callable[[Tensor], Tensor], residual: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.act, ctx.residual, ctx.bias_dtype = act, residual, None if bias is None else bias.dtype
        z = act(hidden).reshape(-1, hidden.shape[-1])
        y = aligned_linear(z, weight, bias)
        if residual:
            add_expanded(y, z, residual)
        return y.view(*hidden.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        out_features, rank = weight.shape
        grad = grad_y.reshape(-1, out_features)
        rows = aligned(grad, pad_rows=False)
        with torch.enable_grad():
            leaf = hidden.detach().reshape(-1, rank).requires_grad_()
            z = ctx.act(leaf)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_z = (rows @ aligned(weight.to(grad.dtype)))[:, :rank]
            if ctx.residual:
                add_gathered(grad_z, grad, ctx.residual)
            (grad_hidden,) = torch.autograd.grad(z, leaf, grad_z.to(hidden.dtype))
            grad_hidden = grad_hidden.view(hidden.shape)
        if ctx.needs_input_grad[1]:
            columns = aligned(z.detach().to(grad.dtype), pad_rows=False)
            grad_weight = (rows.t() @ columns)[:out_features, :rank].contiguous().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None
