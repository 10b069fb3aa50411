"""SLTrain's algorithm as published, without optimization: the baseline of the benchmarks.

    W  = B (scale A) with the values added at I          (Algorithm 1 of arXiv 2406.02214)
    y  = x W^T                                           x, scale A, B, I, values are kept
    dx = dy W, where W is built a second time
    dW = dy^T x, formed whole;   d(scale A) = B^T dW,   dB = dW (scale A)^T,   dvalues = dW at I

I is int64; the scale multiplies A outside of the function. Each step builds three dense (out, in) matrices, two of them
by atomic additions, and does more arithmetic than a dense layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _PublishedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, values, indices)
        return x @ _dense(A, B, values, indices).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, indices = ctx.saved_tensors
        grad_x = grad_y @ _dense(A, B, values, indices)
        grad_weight = grad_y.flatten(0, -2).t() @ x.flatten(0, -2)  # (out, in)
        return grad_x, B.t() @ grad_weight, grad_weight @ A.t(), grad_weight.flatten()[indices], None


def _dense(A: Tensor, B: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    weight = B @ A
    weight.view(-1).scatter_add_(0, indices, values)
    return weight


class PublishedLinear(nn.Module):
    """y = x W^T, x (..., in) -> (..., out). Parameters A (rank, in), B (out, rank), values (nnz,); buffer indices
    (nnz,) int64, sorted flat positions."""

    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparsity: float,
        alpha: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        num_entries = out_features * in_features
        indices = torch.randperm(num_entries)[: int(sparsity * num_entries)].sort().values
        bound = 1 / math.sqrt(in_features)
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(len(indices), device=device, dtype=dtype).uniform_(-bound, bound))
        self.register_buffer("indices", indices.to(self.values.device))

    def forward(self, x: Tensor) -> Tensor:
        return _PublishedProduct.apply(x, self.scale * self.A, self.B, self.values, self.indices)

    def multiply_adds(self) -> int:
        """Those of x W^T for one row of x by the method's mathematics, as ReplacedLinear counts them; this algorithm
        does more."""
        return self.A.numel() + self.B.numel() + self.values.numel()
