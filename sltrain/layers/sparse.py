"""Products with S alone: y = x S^T, and dx = dy S with dvalues = (dy^T x) at the trained positions.

    N rows, in and out features, nnz trained entries

    kind                    product                                                        multiply-adds
    uniform, stratified     CPU, float32: the kernel                                       N nnz, entry by entry
                            elsewhere: S is made dense a slice of rows at a time           N in out, on matrix units
    block                   CPU, float32: the kernel; elsewhere one batched product        N nnz, on matrix units
    column, slice           the trained columns of x times a small dense matrix            N nnz, on matrix units
    rolled                  one batched product of runs of x with the blocks               N nnz, on matrix units

Nothing of size (out, in) is ever allocated, and no product waits for the GPU: what depends on the drawn positions is
computed on their device. Several S that are applied to the same x go through the kernel together, which then reads x
once. This is plain arithmetic on detached tensors (functional.py defines the gradients); products without the kernel
are methods of the supports.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sltrain import kernels
from sltrain.layers.parts import SparsePart
from sltrain.layers.support import Support


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CPU kernel computes products with the supports that it takes."""
    return device.type == "cpu" and dtype == torch.float32 and kernels.status() is None


def can_share(supports: Iterable[Support]) -> bool:
    """Whether one call can take an S of each: all go through the kernel with one block size, or none does."""
    return len({support.kernel_block for support in supports}) == 1


def forward(x: Tensor, matrices: list[SparsePart]) -> list[Tensor]:
    """x (N, in) -> x S^T (N, out) for each S, new tensors. All S have the same in, and can share."""
    block_size = _kernel_block(x, matrices)
    if block_size is None:
        return [s.support.forward(x, s.indices, s.values) for s in matrices]
    values, places = _to_kernel(matrices)
    return kernels.forward(x, values, places, [s.support.out_features for s in matrices], block_size)


def backward(x: Tensor, grads: list[Tensor], matrices: list[SparsePart]) -> tuple[Tensor, list[Tensor]]:
    """x (N, in) and a gradient (N, out) for each S -> the sum of grad S, (N, in), and each S's dvalues (nnz,)."""
    block_size = _kernel_block(x, matrices)
    if block_size is None:
        grad_x = torch.zeros_like(x)
        pairs = zip(grads, matrices, strict=True)
        return grad_x, [s.support.backward(x, grad, s.indices, s.values, grad_x) for grad, s in pairs]
    values, places = _to_kernel(matrices)
    grad_x, *found = kernels.backward(x, grads, values, places, block_size)
    return grad_x, [s.support.from_kernel(s.indices, grad) for grad, s in zip(found, matrices, strict=True)]


def _kernel_block(x: Tensor, matrices: list[SparsePart]) -> int | None:
    """The block size with which the kernel takes these; None if it does not."""
    assert can_share(s.support for s in matrices)
    block_size = matrices[0].support.kernel_block
    return block_size if block_size is not None and has_kernel(x.device, x.dtype) else None


def _to_kernel(matrices: list[SparsePart]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [s.support.to_kernel(s.indices, s.values) for s in matrices]
    return [values for values, _ in pairs], [places for _, places in pairs]
