"""A matrix that keeps N of every M neighbouring entries of a row, and products with it.

    keep n of m   n of each group of m columns, counted from the left; a last, shorter group of c columns keeps
                  min(n, c). With m = in the whole row is one group: no pattern, only a number of entries a row.
    values        (out, kept), the kept entries of each row, from left to right
    mask          (out, ceil(in / 8)) uint8: a bit an entry, the first column in the lowest bit

Every row keeps the same number, so values are a matrix, and any rows of it can be decoded without counting bits.

    y = x W^T        W is composed for the call                      values and mask are saved, not W
    dx = dy W        W is composed again                             or with fewer entries, see `masked_linear`
    dvalues          dy^T x at the kept places: dense for the call

so gradients and an optimizer's moments exist for kept entries alone. At a sparsity s of a matrix of n entries that is
4 (1 - s) n numbers and n bits in training, where a dense matrix beside a mask would take 4 n. The dense W or dW of one
layer lives inside a call. Both are decoded some rows at a time; on CUDA, which wants large pieces, torch numbers the
entries of one, some 64 MB that no footprint counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers.aligned import aligned, aligned_linear, autocast_dtype, cast_to
from sltrain.layers.parts import Part

# Entries decoded at once. On a CPU fewer than torch's threads would share: above, several threads number all entries of
# a mask first, 16 bytes each.
CPU_PIECE, CUDA_PIECE = 2**15 - 1, 2**22


def kept_per_row(in_features: int, n: int, m: int) -> int:
    """Entries that a row of `in_features` keeps. Raises ValueError unless 1 <= n <= m <= in_features."""
    if not 1 <= n <= m <= in_features:
        raise ValueError(f"cannot keep {n} of every {m} entries of a row of {in_features}")
    return n * (in_features // m) + min(n, in_features % m)


def keep_largest(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask, (out, in) bool, of the n largest scores (out, in) in each group of m columns. Finite scores only."""
    out_features, in_features = scores.shape
    padded = F.pad(scores, (0, -in_features % m), value=-torch.inf).view(out_features, -1, m)
    places = padded.topk(n, dim=2).indices
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=scores.device).scatter_(2, places, True)
    return mask.view(out_features, -1)[:, :in_features]


def pack(mask: Tensor) -> Tensor:
    """(rows, columns) bool -> (rows, ceil(columns / 8)) uint8."""
    bits = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << _shifts(mask)).sum(2, dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """(rows, ceil(columns / 8)) uint8 -> (rows, columns) bool."""
    return bits[:, :, None].bitwise_right_shift(_shifts(bits)).bitwise_and_(1).view(torch.bool).flatten(1)[:, :columns]


def compose(values: Tensor, mask: Tensor, in_features: int, again: Tensor | None = None) -> Tensor:
    """The dense matrix (out, in) in the dtype of the values. `again`, the bits of a mask on the values, leaves out
    those where it is 0."""
    dense = values.new_zeros(len(values), in_features)
    for rows in _pieces(mask, in_features):
        kept = values[rows] if again is None else values[rows] * unpack(again[rows], values.shape[1])
        dense[rows].masked_scatter_(unpack(mask[rows], in_features), kept)
    return dense


def gather(dense: Tensor, mask: Tensor, kept: int) -> Tensor:
    """The values (out, kept) of a dense matrix (out, in) at the kept places: what `compose` undoes."""
    values = dense.new_empty(len(dense), kept)
    for rows in _pieces(mask, dense.shape[1]):
        values[rows] = dense[rows].masked_select(unpack(mask[rows], dense.shape[1])).view(-1, kept)
    return values


def product_bytes(out_features: int, in_features: int, kept: int, element_size: int) -> int:
    """Temporaries of `masked_linear` on a CPU: W or dW dense, and a piece with its mask and what is selected of it."""
    rows = min(out_features, _rows_at_once(in_features, CPU_PIECE))
    return out_features * in_features * element_size + rows * (in_features + 2 * kept * element_size)


@dataclass(frozen=True)
class MaskedPart(Part):
    """W of `values` (out, kept) and the bits of its mask."""

    values: Tensor
    mask: Tensor
    in_features: int
    group = "sparse"

    def dense(self) -> Tensor:
        return compose(self.values.detach(), self.mask, self.in_features)

    def norm(self) -> Tensor:
        return self.values.detach().float().norm()


def masked_linear(
    x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None = None, again: Tensor | None = None
) -> Tensor:
    """x (..., in) -> x W^T + bias (..., out), for the W of `values` and `mask`. With `again` the gradient of x is
    dy W2, where W2 has only those values at which `again`, bits over the values, is 1; other gradients are exact."""
    return _Masked.apply(x, values, mask, bias, again, autocast_dtype(x))


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        again: Tensor | None,
        cast: torch.dtype | None,
    ) -> Tensor:
        weight = compose(cast_to(values, cast), mask, x.shape[-1])
        ctx.save_for_backward(x, values, mask, again)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return aligned_linear(cast_to(x, cast), weight, None if bias is None else cast_to(bias, cast))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask, again = ctx.saved_tensors
        dtype, (out_features, kept), in_features = grad_y.dtype, values.shape, x.shape[-1]
        rows = aligned(grad_y.reshape(-1, out_features), pad_rows=False)
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = aligned(compose(values.to(dtype), mask, in_features, again))
            grad_x = (rows @ weight)[:, :in_features].reshape(x.shape).to(x.dtype)
            del weight  # before dW is allocated
        if ctx.needs_input_grad[1]:
            columns = aligned(x.to(dtype).reshape(-1, in_features), pad_rows=False)
            grad_weight = (rows.t() @ columns)[:out_features, :in_features]
            grad_values = gather(grad_weight, mask, kept).to(values.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)[:out_features].to(ctx.bias_dtype)
        return grad_x, grad_values, None, grad_bias, None, None


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _pieces(mask: Tensor, in_features: int) -> Iterator[slice]:
    """Ranges of rows to decode at once."""
    at_once = _rows_at_once(in_features, CPU_PIECE if mask.device.type == "cpu" else CUDA_PIECE)
    for first in range(0, len(mask), at_once):
        yield slice(first, first + at_once)


def _rows_at_once(in_features: int, piece: int) -> int:
    return max(1, piece // in_features)
