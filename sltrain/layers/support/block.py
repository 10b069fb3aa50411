"""Blocks of b x b, stored as int32 block numbers (block row * block columns + block column), sorted.

The block lines of the shorter side hold k blocks each, those of the longer side equally many, give or take one. A
regular bipartite graph is a sum of permutations (König), so every such support contains a block permutation matrix,
which alone has full rank; independently random blocks leave block rows empty and do not. Where b does not divide a
side, blocks overhang the matrix and train only what is inside.

A product is one batched product of each block row with the columns of x that its blocks read, or, on a CPU in float32,
the kernel's: N nnz multiply-adds on matrix units either way.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sltrain.layers.support.base import Support, lines_of

BLOCK_SIZES = (64, 32, 16, 8, 4, 2, 1)  # tried in this order: large blocks make efficient products
BLOCK_TOLERANCE = 0.1  # relative error of the sparsity up to which a block size is accepted


class BlockSupport(Support):
    """Random blocks. Values come block after block, each row by row, without what overhangs."""

    kind = "block"
    price = "block_entry"
    piece_entry_bytes = 40

    block: int  # side b

    def __init__(self, out_features: int, in_features: int, sparsity: float, block_size: int | None = None) -> None:
        super().__init__(out_features, in_features, sparsity, block_size)
        if sparsity == 0:
            raise ValueError("support=block needs sparsity above 0; for B A alone use support=uniform")
        side, shape = min(out_features, in_features), f"{out_features} x {in_features}"
        size = block_size if block_size is not None else _pick_size(side, max(out_features, in_features), sparsity)
        if not 1 <= size <= side:
            raise ValueError(
                f"block_size={size} does not fit into a {shape} matrix; use at most {side}, or drop block_size"
            )
        self.block = self.kernel_block = size
        if sparsity > 0.5:
            raise ValueError(f"support=block takes sparsity up to 0.5, got {sparsity}; use support=uniform")
        self.grid = num_rows, num_columns = -(-out_features // size), -(-in_features // size)  # overhanging ones too
        longer = max(self.grid)
        if round(sparsity * longer) == 0:
            raise ValueError(
                f"sparsity {sparsity} is less than one {size} x {size} block a block line of a {shape} matrix, "
                f"which is {1 / longer:.2g}; use a smaller block_size, or support=uniform"
            )
        missing_rows, missing_columns = num_rows * size - out_features, num_columns * size - in_features
        self.tiles = missing_rows == missing_columns == 0  # no block overhangs
        self.blocks_per_line = min(round(sparsity * longer), max(1, longer - 1))  # k, of the shorter side
        self.num_indices = self.blocks_per_line * min(self.grid)  # T blocks
        # The number of blocks in the last lines does not depend on the draw.
        per_long_line = self.num_indices // longer
        in_last_row = self.blocks_per_line if num_rows <= num_columns else per_long_line
        in_last_column = self.blocks_per_line if num_columns < num_rows else per_long_line
        outside = size * (missing_rows * in_last_row + missing_columns * in_last_column)
        self.num_nonzero = self.num_indices * size * size - outside

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Sorted block numbers: lines are paired uniformly, then swaps separate pairs that occur twice.

        If the blocks do not divide a side, its last line gets no extra block and the corner stays empty, so that the
        number of trained entries does not depend on the draw.
        """
        (shorter, longer), count = sorted(self.grid), self.num_indices
        candidates = torch.randperm(longer if self.tiles else longer - 1, generator=generator, device="cpu")
        extra = candidates[: count % longer]
        balanced = torch.cat([torch.arange(longer, device="cpu").repeat(count // longer), extra])
        of_longer = balanced[torch.randperm(count, generator=generator, device="cpu")].tolist()
        of_shorter = [line for line in range(shorter) for _ in range(self.blocks_per_line)]
        corner = None if self.tiles else (shorter - 1, longer - 1)
        _separate(of_shorter, of_longer, corner, generator)
        num_rows, num_columns = self.grid
        rows, columns = (of_shorter, of_longer) if num_rows <= num_columns else (of_longer, of_shorter)
        numbers = sorted(row * num_columns + column for row, column in zip(rows, columns, strict=True))
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        blocks, rows, columns = self._places(indices, entries)
        first_rows, first_columns = self._corners(indices)
        rows.add_(first_rows[blocks]).mul_(self.in_features)
        return rows.add_(first_columns[blocks]).add_(columns)

    def _corners(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """First row and first column of each block, (T,) int64."""
        numbers = indices.long()
        return numbers // self.grid[1] * self.block, numbers % self.grid[1] * self.block

    def _places(self, indices: Tensor, entries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The block of each of these entries, and its row and column in the block, each (n,) int64. The number of
        entries in each block, below b * b where it overhangs, is computed on the device."""
        first_rows, first_columns = self._corners(indices)
        heights = (self.out_features - first_rows).clamp(max=self.block)  # (T,)
        widths = (self.in_features - first_columns).clamp(max=self.block)
        starts = F.pad((heights * widths).cumsum(0), (1, 0))  # (T + 1,)
        blocks = lines_of(starts, entries)
        numbers = torch.arange(entries.start, entries.stop, device=indices.device)
        numbers -= starts[blocks]
        width = widths[blocks]
        return blocks, numbers // width, numbers.remainder_(width)

    # ---- products

    def to_kernel(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._to_blocks(indices, values), indices

    def from_kernel(self, indices: Tensor, grad_values: Tensor) -> Tensor:
        """(T, b, b) -> (nnz,): the entries inside the matrix."""
        flat = grad_values.flatten()
        if self.tiles:
            return flat
        values = flat.new_empty(self.num_nonzero)
        for entries, places in self._pieces_in_blocks(indices):
            values[entries] = flat[places]
        return values

    def forward(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        y = _block_product(x, self._to_blocks(indices, values), indices, self.grid)
        return y[:, : self.out_features].contiguous()

    def backward(self, x: Tensor, grad: Tensor, indices: Tensor, values: Tensor, grad_x: Tensor) -> Tensor:
        size, (num_rows, num_columns) = self.block, self.grid
        # dx = grad S is a product with the transposed blocks, sorted by block column.
        transposed = indices % num_columns * num_rows + indices // num_columns
        transposed, order = transposed.sort()
        blocks = self._to_blocks(indices, values)[order].transpose(1, 2)
        grad_x += _block_product(grad, blocks, transposed, (num_columns, num_rows))[:, : x.shape[1]]

        slots = _place(indices, self.grid)
        grad_rows = F.pad(grad, (0, num_rows * size - grad.shape[1])).view(len(grad), num_rows, size)
        grad_weights = grad_rows.permute(1, 2, 0) @ _read(x, slots, self.grid, size)  # (R, b, m b)
        grad_blocks = grad_weights.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)[slots.of_block]
        return self.from_kernel(indices, grad_blocks).to(values.dtype)

    def temporary_bytes(self, num_rows: int, element_size: int) -> int:
        shorter, longer = sorted(self.grid)  # each block row gathers the columns of x that it reads
        gathered = num_rows * -(-self.num_indices // shorter) * shorter * self.block
        padded = num_rows * longer * self.block
        return (2 * gathered + padded + 3 * self.num_indices * self.block**2) * element_size

    def _to_blocks(self, indices: Tensor, values: Tensor) -> Tensor:
        """Values (nnz,) -> (T, b, b), zero where a block overhangs the matrix."""
        shape = (len(indices), self.block, self.block)
        if self.tiles:
            return values.view(shape)
        blocks = torch.zeros(shape, dtype=values.dtype, device=values.device)
        for entries, places in self._pieces_in_blocks(indices):
            blocks.view(-1)[places] = values[entries]
        return blocks

    def _pieces_in_blocks(self, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """As `pieces`, with places among the T * b * b entries of all blocks instead of positions in the matrix."""
        for entries in self._chunks():
            blocks, rows, columns = self._places(indices, entries)
            yield entries, blocks.mul_(self.block).add_(rows).mul_(self.block).add_(columns)


def _pick_size(shorter: int, longer: int, sparsity: float) -> int:
    """The largest of BLOCK_SIZES whose sparsity is near, for a matrix with these sides."""

    def error(size: int) -> float:
        lines = -(-longer // size)
        return abs(round(sparsity * lines) / lines - sparsity) / sparsity

    sizes = [size for size in BLOCK_SIZES if size <= shorter]
    fitting = [size for size in sizes if round(sparsity * -(-longer // size)) > 0] or [1]
    return next((size for size in fitting if error(size) <= BLOCK_TOLERANCE), min(fitting, key=error))


@dataclass
class _Slots:
    """The layout in which each of R block rows has m slots for blocks."""

    of_block: Tensor  # (T,) slot of each block
    columns: Tensor  # (R, m) block column that each slot reads; a free slot reads the first one, times zeros


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
    """x (N, in) -> (R, N, m b): the columns of x that the blocks of each block row multiply."""
    blocks = F.pad(x, (0, grid[1] * size - x.shape[1])).view(len(x), grid[1], size)
    return blocks[:, slots.columns].transpose(0, 1).flatten(2)  # (N, R, m, b) before


def _block_product(x: Tensor, blocks: Tensor, indices: Tensor, grid: tuple[int, int]) -> Tensor:
    """x (N, in) times the transposed blocks (T, b, b): (N, R b)."""
    size, slots = blocks.shape[1], _place(indices, grid)
    weights = torch.zeros(slots.columns.numel(), size, size, dtype=x.dtype, device=x.device)
    weights[slots.of_block] = blocks.to(x.dtype)
    weights = weights.view(*slots.columns.shape, size, size).transpose(2, 3).flatten(1, 2)  # (R, m b, b)
    return (_read(x, slots, grid, size) @ weights).transpose(0, 1).flatten(1)


def _separate(
    first: list[int], second: list[int], forbidden: tuple[int, int] | None, generator: torch.Generator | None
) -> None:
    """Swap entries of `second`, in place, until all pairs (first[i], second[i]) are distinct and none is `forbidden`.
    No swap creates a pair that exists, so each leaves fewer bad ones; at most half of all possible pairs exist, so a
    swap can always be found."""
    taken = Counter(zip(first, second, strict=True))

    def is_bad(i: int) -> bool:
        pair = (first[i], second[i])
        return taken[pair] > 1 or pair == forbidden

    bad = [i for i in range(len(first)) if is_bad(i)]
    while bad:
        i, j = bad[-1], int(torch.randint(len(first), (), generator=generator, device="cpu"))
        if not is_bad(i):
            bad.pop()
            continue
        new = (first[i], second[j]), (first[j], second[i])
        if second[i] == second[j] or first[i] == first[j] or any(taken[p] or p == forbidden for p in new):
            continue
        taken.subtract([(first[i], second[i]), (first[j], second[j])])
        taken.update(new)
        second[i], second[j] = second[j], second[i]
