"""y = act(h) W^T for a projection with an activation between its factors, which keeps h alone for backward.

Autograd would keep h for the activation and act(h) for the product. Here act(h), (N, r), is computed again in backward,
which costs no product. Without an activation the layer is an ordinary low-rank one. Differentiable once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers.aligned import aligned, aligned_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
NONE = "none"


def check_activation(name: str) -> None:
    """Raise ValueError for a name that is neither one of ACTIVATIONS nor `none`."""
    if name not in (*ACTIVATIONS, NONE):
        raise ValueError(f"activation is {name!r}; choose one of {', '.join([*ACTIVATIONS, NONE])}")


def activated_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """hidden (..., r), weight (out, r), bias (out,) -> act(h) weight^T + bias (..., out); `none`: hidden as it is."""
    if activation == NONE:
        return aligned_linear(hidden, weight, bias)
    return _ActivatedLinear.apply(hidden, weight, bias, ACTIVATIONS[activation])


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.activation, ctx.bias_dtype = activation, None if bias is None else bias.dtype
        return aligned_linear(activation(hidden), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        out_features, rank = weight.shape
        rows = aligned(grad_y.reshape(-1, out_features), pad_rows=False)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            activated = ctx.activation(leaf)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad = (rows @ aligned(weight.to(grad_y.dtype)))[:, :rank].reshape(hidden.shape)
            (grad_hidden,) = torch.autograd.grad(activated, leaf, grad.to(hidden.dtype))
        if ctx.needs_input_grad[1]:
            columns = aligned(activated.detach().to(grad_y.dtype).reshape(-1, rank), pad_rows=False)
            grad_weight = (rows.t() @ columns)[:out_features, :rank].contiguous().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)[:out_features].to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None
