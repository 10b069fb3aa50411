"""Products with a dense matrix whose sides are zero-padded to what matrix units read fast, and nn.Linear with them.

Matrix units read rows in pieces of 16 bytes and are slow on matrices whose sides do not divide into them, such as the
5461 of LLaMA 1B. On CUDA such sides are padded inside the product; no padded tensor is kept for backward. Under
autocast the arithmetic and the output have autocast's dtype, each gradient that of its tensor; F.linear would keep the
cast weight for backward, here it is cast again. So is a frozen weight of another dtype than x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class AlignedLinear(nn.Linear):
    """nn.Linear with the same parameters, computed on aligned sides. `gain` multiplies the model's start of them."""

    gain = 1.0

    @classmethod
    def of(cls, linear: nn.Linear, gain: float = 1.0) -> "AlignedLinear":
        """A layer with the parameters of `linear`, on its device."""
        aligned = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        aligned.weight, aligned.bias = linear.weight, linear.bias
        aligned.gain = gain
        return aligned

    def forward(self, x: Tensor) -> Tensor:
        return aligned_linear(x, self.weight, self.bias)


def alignment(tensor: Tensor) -> int:
    """The number that sides of matrices of this device and dtype should be a multiple of; 1 if it does not matter."""
    return 16 // tensor.element_size() if tensor.is_cuda and tensor.element_size() < 4 else 1


def aligned(matrix: Tensor, pad_rows: bool = True) -> Tensor:
    """The matrix, zero-padded to aligned sides where necessary; without `pad_rows` only its second side."""
    multiple = alignment(matrix)
    rows, columns = -matrix.shape[0] % multiple if pad_rows else 0, -matrix.shape[1] % multiple
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def aligned_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, casts: bool = False) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out), computed on aligned sides. `casts`: a weight
    of another dtype than x is cast in each product, and no copy is kept."""
    multiple, cast = alignment(weight), autocast_dtype(x)
    if casts and cast is None and weight.dtype != x.dtype:
        cast = x.dtype
    if weight.shape[0] % multiple == 0 and weight.shape[1] % multiple == 0 and cast in (None, weight.dtype):
        return F.linear(x, weight, bias)
    return _AlignedLinear.apply(x, weight, bias, cast)


def autocast_dtype(x: Tensor, device_type: str | None = None) -> torch.dtype | None:
    """The dtype in which autocast computes x W^T on x's device, or on another type of device; None without autocast,
    and for float64, which it does not cast."""
    device_type = device_type or x.device.type
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return None


def cast_to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype`; unchanged for None."""
    return tensor if dtype is None else tensor.to(dtype)


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cast: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = aligned(cast_to(x, cast).reshape(-1, x.shape[-1]), pad_rows=False)
        y = (rows @ aligned(cast_to(weight, cast)).t())[:, : len(weight)].unflatten(0, x.shape[:-1])
        return y if bias is None else y.add_(cast_to(bias, cast))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        out_features, in_features = weight.shape
        rows = aligned(grad_y.reshape(-1, out_features), pad_rows=False)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ aligned(weight.to(grad_y.dtype)))[:, :in_features].reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            columns = aligned(x.to(grad_y.dtype).reshape(-1, in_features), pad_rows=False)
            grad_weight = (rows.t() @ columns)[:out_features, :in_features].contiguous().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)[:out_features].to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
