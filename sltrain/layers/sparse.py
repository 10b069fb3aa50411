"""Products with S alone: y = x S^T, and dx = dy S with dvalues = (dy^T x) at the trained positions.

    N rows, in and out features, nnz trained entries, blocks of side b

    kind                    product                                                        multiply-adds
    uniform, stratified     CPU, float32: the kernel of cpu_kernel.py                      N nnz, entry by entry
                            elsewhere: S is made dense a slice of rows at a time           N in out, on matrix units
    block                   CPU, float32: the kernel; elsewhere one batched product, in    N nnz, on matrix units
                            which a block row meets the columns of x that its blocks read
    column                  the trained columns of x times a small dense matrix            N nnz, on matrix units

Nothing of size (out, in) is ever made, and no product waits for the GPU: what depends on the drawn positions is
computed on their device. Several matrices that are applied to the same x go through the kernel together, which then
reads x once. Everything here is plain arithmetic on detached tensors; gradients are put together in functional.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sltrain.kernels import cpu_kernel
from sltrain.layers.support import Support

NUM_SLICES = 4  # an unstructured S is made dense in this many pieces, one after the other


@dataclass
class Sparse:
    """One S, (out, in): its support, the drawn indices, and its values (nnz,)."""

    support: Support
    indices: Tensor
    values: Tensor

    @property
    def family(self) -> str:
        """How it is multiplied: entries, block or column."""
        return "entries" if self.support.kind in ("uniform", "stratified") else self.support.kind


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products with uniform, stratified and block supports run through the CPU kernel."""
    return device.type == "cpu" and dtype == torch.float32 and cpu_kernel.status() is None


def forward(x: Tensor, matrices: list[Sparse]) -> list[Tensor]:
    """x (N, in) -> x S^T (N, out) for each S, new tensors. All S have the same in."""
    family = _common_family(matrices)
    if family != "column" and has_kernel(x.device, x.dtype):
        outs = [s.support.out_features for s in matrices]
        if family == "entries":
            return cpu_kernel.sparse_forward(x, [s.values for s in matrices], _positions(matrices), outs)
        blocks = [_to_blocks(s) for s in matrices]
        size = matrices[0].support.block
        return cpu_kernel.block_forward(x, blocks, [s.indices for s in matrices], outs, size)
    return [_FORWARD[s.family](x, s) for s in matrices]


def backward(x: Tensor, grads: list[Tensor], matrices: list[Sparse]) -> tuple[Tensor, list[Tensor]]:
    """x (N, in) and a gradient (N, out) for each S -> the sum of grad S, (N, in), and each S's dvalues (nnz,)."""
    family = _common_family(matrices)
    if family != "column" and has_kernel(x.device, x.dtype):
        values = [s.values for s in matrices]
        if family == "entries":
            grad_x, *grad_values = cpu_kernel.sparse_backward(x, grads, values, _positions(matrices))
            return grad_x, grad_values
        blocks, size = [_to_blocks(s) for s in matrices], matrices[0].support.block
        grad_x, *grad_blocks = cpu_kernel.block_backward(x, grads, blocks, [s.indices for s in matrices], size)
        return grad_x, [_from_blocks(g, s) for g, s in zip(grad_blocks, matrices, strict=True)]
    grad_x, grad_values = torch.zeros_like(x), []
    for grad, s in zip(grads, matrices, strict=True):
        grad_values.append(_BACKWARD[s.family](x, grad, s, grad_x))
    return grad_x, grad_values


def can_share(matrices: list[Sparse]) -> bool:
    """Whether one call may take these: one way to multiply, and one block size."""
    return len({(s.family, s.family == "block" and s.support.block) for s in matrices}) == 1


def _common_family(matrices: list[Sparse]) -> str:
    assert can_share(matrices)
    return matrices[0].family


def _positions(matrices: list[Sparse]) -> list[Tensor]:
    return [s.support.positions(s.indices) for s in matrices]


# uniform and stratified, without the kernel


def _slices(s: Sparse) -> list[tuple[int, int]]:
    """First and last row of the pieces in which S is made dense."""
    out_features = s.support.out_features
    step = -(-out_features // NUM_SLICES)
    return [(first, min(first + step, out_features)) for first in range(0, out_features, step)]


def _slots(s: Sparse, first: int, last: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The values, some at a time: which of them, where each goes in the flattened rows first .. last - 1, and whether
    it does. Those of other rows go to the slot behind, so that no count has to come to the host."""
    in_features = s.support.in_features
    size = (last - first) * in_features
    for entries, positions in s.support.pieces(s.indices):
        slots = positions.sub_(first * in_features)
        inside = (slots >= 0) & (slots < size)
        yield entries, torch.where(inside, slots, size), inside


def _entries_forward(x: Tensor, s: Sparse) -> Tensor:
    y = x.new_empty((len(x), s.support.out_features))
    for first, last in _slices(s):
        y[:, first:last] = x @ _dense_rows(s, first, last, x.dtype).t()
    return y


def _entries_backward(x: Tensor, grad: Tensor, s: Sparse, grad_x: Tensor) -> Tensor:
    grad_values = torch.zeros_like(s.values)
    for first, last in _slices(s):
        part = grad[:, first:last]
        grad_x.addmm_(part, _dense_rows(s, first, last, x.dtype))
        grad_rows = (part.t() @ x).view(-1)
        for entries, slots, inside in _slots(s, first, last):
            own = grad_rows[slots.clamp_(max=len(grad_rows) - 1)].to(grad_values.dtype)
            grad_values[entries] = torch.where(inside, own, grad_values[entries])
    return grad_values


def _dense_rows(s: Sparse, first: int, last: int, dtype: torch.dtype) -> Tensor:
    in_features = s.support.in_features
    size = (last - first) * in_features
    flat = torch.zeros(size + 1, dtype=dtype, device=s.values.device)
    for entries, slots, _ in _slots(s, first, last):
        flat[slots] = s.values[entries].to(dtype)
    return flat[:size].view(last - first, in_features)


# block


def _to_blocks(s: Sparse) -> Tensor:
    """Values (nnz,) -> (T, b, b), zero where a block sticks out of the matrix."""
    shape = (len(s.indices), s.support.block, s.support.block)
    if s.support.tiles:
        return s.values.view(shape)
    blocks = torch.zeros(shape, dtype=s.values.dtype, device=s.values.device)
    for entries, places in s.support.pieces_in_blocks(s.indices):
        blocks.view(-1)[places] = s.values[entries]
    return blocks


def _from_blocks(blocks: Tensor, s: Sparse) -> Tensor:
    """(T, b, b) -> (nnz,): the entries inside the matrix."""
    flat = blocks.flatten()
    if s.support.tiles:
        return flat
    values = flat.new_empty(s.support.num_nonzero)
    for entries, places in s.support.pieces_in_blocks(s.indices):
        values[entries] = flat[places]
    return values


@dataclass
class _Slots:
    """Where blocks go when each block row gets equally many places, and which columns of x those places read."""

    of_block: Tensor  # (T,) place of each block
    columns: Tensor  # (R, m) block column that each place reads; a free place reads the first one, and meets zeros


def _place(indices: Tensor, grid: tuple[int, int]) -> _Slots:
    num_rows, num_columns = grid
    rows, columns = indices.long() // num_columns, indices.long() % num_columns
    per_row = -(-len(rows) // num_rows)
    number_in_row = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    places = rows * per_row + number_in_row
    read = torch.zeros(num_rows * per_row, dtype=torch.int64, device=rows.device)
    read[places] = columns
    return _Slots(places, read.view(num_rows, per_row))


def _read(x: Tensor, slots: _Slots, grid: tuple[int, int], size: int) -> Tensor:
    """x (N, in) -> (R, N, m b): what the blocks of each block row multiply."""
    blocks = F.pad(x, (0, grid[1] * size - x.shape[1])).view(len(x), grid[1], size)
    return blocks[:, slots.columns].transpose(0, 1).flatten(2)  # (N, R, m, b) before


def _block_product(x: Tensor, blocks: Tensor, indices: Tensor, grid: tuple[int, int]) -> Tensor:
    """x (N, in) times the transposed blocks (T, b, b): (N, R b)."""
    size, slots = blocks.shape[1], _place(indices, grid)
    weights = torch.zeros(slots.columns.numel(), size, size, dtype=x.dtype, device=x.device)
    weights[slots.of_block] = blocks.to(x.dtype)
    weights = weights.view(*slots.columns.shape, size, size).transpose(2, 3).flatten(1, 2)  # (R, m b, b)
    return (_read(x, slots, grid, size) @ weights).transpose(0, 1).flatten(1)


def _block_forward(x: Tensor, s: Sparse) -> Tensor:
    y = _block_product(x, _to_blocks(s), s.indices, s.support.grid)
    return y[:, : s.support.out_features].contiguous()


def _block_backward(x: Tensor, grad: Tensor, s: Sparse, grad_x: Tensor) -> Tensor:
    size, (num_rows, num_columns) = s.support.block, s.support.grid
    # dx = grad S is a product with the transposed blocks, put into the order of their block columns.
    transposed = s.indices % num_columns * num_rows + s.indices // num_columns
    transposed, order = transposed.sort()
    product = _block_product(grad, _to_blocks(s)[order].transpose(1, 2), transposed, (num_columns, num_rows))
    grad_x += product[:, : x.shape[1]]

    slots = _place(s.indices, s.support.grid)
    grad_rows = F.pad(grad, (0, num_rows * size - grad.shape[1])).view(len(grad), num_rows, size)
    grad_weights = grad_rows.permute(1, 2, 0) @ _read(x, slots, s.support.grid, size)  # (R, b, m b)
    grad_blocks = grad_weights.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)[slots.of_block]
    return _from_blocks(grad_blocks, s).to(s.values.dtype)


# column


def _column_values(s: Sparse, dtype: torch.dtype) -> Tensor:
    return s.values.view(s.support.out_features, -1).to(dtype)


def _column_forward(x: Tensor, s: Sparse) -> Tensor:
    return x.index_select(1, s.indices) @ _column_values(s, x.dtype).t()


def _column_backward(x: Tensor, grad: Tensor, s: Sparse, grad_x: Tensor) -> Tensor:
    columns = s.indices.long()
    grad_x[:, columns] += grad @ _column_values(s, x.dtype)
    return (grad.t() @ x.index_select(1, columns)).flatten().to(s.values.dtype)


_FORWARD = {"entries": _entries_forward, "block": _block_forward, "column": _column_forward}
_BACKWARD = {"entries": _entries_backward, "block": _block_backward, "column": _column_backward}
