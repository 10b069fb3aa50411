"""A block diagonal of g blocks, rolled by a drawn number of columns. That number and g are all that is stored.

Rows and columns are cut into g runs each, the k-th from floor(k * side / g) to floor((k + 1) * side / g): runs of
one side differ by at most one. The k-th run of rows trains the k-th run of columns, moved `offset` columns to the right
and round the last one. A row thus has about in / g entries and a column about out / g, give or take one; the share of
trained entries is 1 / g, with g the number that comes nearest to the sparsity, or, within a tenth of it, the nearest
that divides both sides. Every block has the full rank that its sides allow, and so has S if they divide.

The roll by single columns is what sets layers apart that read the same x: without it, or by whole blocks, all of them
would join the same groups of inputs. A product is one batched product of the g runs of the rolled x: N nnz
multiply-adds on matrix units, and one copy of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sltrain.layers.support.base import Support, lines_of

TOLERANCE = 0.1  # relative error of the sparsity up to which blocks that divide both sides are preferred


class RolledSupport(Support):
    """A block diagonal, all offsets equally likely. Values come row after row, those of a row in the order of the
    columns before the roll."""

    kind = "rolled"
    price = "column_entry"
    piece_entry_bytes = 40
    kernel_block = None

    def __init__(self, out_features: int, in_features: int, sparsity: float, block_size: int | None = None) -> None:
        super().__init__(out_features, in_features, sparsity, block_size)
        if sparsity == 0:
            raise ValueError("support=rolled needs sparsity above 0; for B A alone use support=uniform")
        shorter, shape = min(out_features, in_features), f"{out_features} x {in_features}"
        most = shorter * (1 + TOLERANCE)
        self.num_blocks = g = _pick_count(out_features, in_features, sparsity) if 1 / sparsity < most else shorter + 1
        if g < 2:
            raise ValueError(
                f"support=rolled with sparsity {sparsity} is one block, all of a {shape} matrix; use sparsity up to"
                " 0.5, or support=uniform"
            )
        if g > shorter:
            raise ValueError(
                f"support=rolled with sparsity {sparsity} makes more blocks than a {shape} matrix can have; use"
                f" sparsity {1 / shorter:.2g} or more, or support=uniform"
            )
        self.tiles = out_features % g == in_features % g == 0  # all blocks are of one size
        self.block_shape = -(-out_features // g), -(-in_features // g)  # of the largest
        ends = [(k * out_features // g, k * in_features // g) for k in range(g + 1)]
        self.num_nonzero = sum((r - p) * (c - q) for (p, q), (r, c) in zip(ends[:-1], ends[1:], strict=True))
        self.num_indices = 2

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        offset = torch.randint(self.in_features, (1,), generator=generator, dtype=torch.int32, device="cpu")
        return torch.cat([offset, torch.full_like(offset, self.num_blocks)])  # g tells a reader of the file

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        blocks, rows, columns = self._places(entries, indices.device)
        rows += self._starts(self.out_features, indices.device)[blocks]
        columns += self._starts(self.in_features, indices.device)[blocks]
        columns += indices[:1]
        return rows.mul_(self.in_features).add_(columns.remainder_(self.in_features))

    def _starts(self, side: int, device: torch.device) -> Tensor:
        """Where each run of this side starts, and the end: (g + 1,) int64."""
        return torch.arange(self.num_blocks + 1, device=device) * side // self.num_blocks

    def _places(self, entries: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The block of each of these entries, and its row and column in the block, each (n,) int64."""
        widths = self._starts(self.in_features, device).diff()
        sizes = self._starts(self.out_features, device).diff() * widths
        starts = F.pad(sizes.cumsum(0), (1, 0))  # of the blocks among the entries
        blocks = lines_of(starts, entries)
        numbers = torch.arange(entries.start, entries.stop, device=device)
        numbers -= starts[blocks]
        width = widths[blocks]
        return blocks, numbers // width, numbers.remainder_(width)

    # ---- products: a run that is shorter than the longest is filled up, and what fills it up is multiplied by zeros

    def forward(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        y = self._runs(x, self._columns(indices)) @ self._blocks(values, x.dtype).transpose(1, 2)  # (g, N, h)
        rows = y.transpose(0, 1).flatten(1)
        if self.tiles:
            return rows
        starts = self._starts(self.out_features, x.device)
        of_row = lines_of(starts, slice(0, self.out_features))
        inner = torch.arange(self.out_features, device=x.device) - starts[of_row]
        return rows.index_select(1, of_row * self.block_shape[0] + inner)

    def backward(self, x: Tensor, grad: Tensor, indices: Tensor, values: Tensor, grad_x: Tensor) -> Tensor:
        grad_runs = self._runs(grad, self._run_members(self.out_features, x.device))  # (g, N, h)
        grad_columns = (grad_runs @ self._blocks(values, x.dtype)).transpose(0, 1).flatten(1)
        members = self._columns(indices)
        grad_x.index_add_(1, members.flatten(), grad_columns)  # what fills up is zero
        grad_blocks = grad_runs.transpose(1, 2) @ self._runs(x, members)
        return self._values(grad_blocks).to(values.dtype)

    def temporary_bytes(self, num_rows: int, element_size: int) -> int:
        height, width = (self.num_blocks * side for side in self.block_shape)
        return (num_rows * (height + 2 * width) + 2 * height * self.block_shape[1]) * element_size

    def _run_members(self, side: int, device: torch.device) -> Tensor:
        """The rows, or columns before the roll, of each run: (g, longest run) int64; the side's last ones fill up."""
        starts = self._starts(side, device)[:-1]
        longest = -(-side // self.num_blocks)
        return (starts[:, None] + torch.arange(longest, device=device)).clamp_(max=side - 1)

    def _columns(self, indices: Tensor) -> Tensor:
        """The columns that each run of rows trains, (g, w) int64."""
        return self._run_members(self.in_features, indices.device).add_(indices[:1]).remainder_(self.in_features)

    def _runs(self, x: Tensor, members: Tensor) -> Tensor:
        """x (N, side) -> (g, N, longest run): these columns of x."""
        return x.index_select(1, members.flatten()).view(len(x), *members.shape).transpose(0, 1)

    def _blocks(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values (nnz,) -> (g, h, w), zero where a block is smaller than the largest."""
        shape = (self.num_blocks, *self.block_shape)
        if self.tiles:
            return values.view(shape).to(dtype)
        blocks = torch.zeros(shape, dtype=dtype, device=values.device)
        for entries in self._chunks():
            blocks.view(-1)[self._in_blocks(entries, values.device)] = values[entries].to(dtype)
        return blocks

    def _values(self, blocks: Tensor) -> Tensor:
        """(g, h, w) -> (nnz,)."""
        if self.tiles:
            return blocks.flatten()
        values = blocks.new_empty(self.num_nonzero)
        for entries in self._chunks():
            values[entries] = blocks.flatten()[self._in_blocks(entries, blocks.device)]
        return values

    def _in_blocks(self, entries: slice, device: torch.device) -> Tensor:
        """The places of these entries among the g h w of all blocks, (n,) int64."""
        (height, width), (blocks, rows, columns) = self.block_shape, self._places(entries, device)
        return blocks.mul_(height).add_(rows).mul_(width).add_(columns)


def _pick_count(out_features: int, in_features: int, sparsity: float) -> int:
    """The number of blocks whose share of entries is nearest; of those within TOLERANCE one that divides both sides,
    if there is one."""

    def error(count: int) -> float:
        return abs(1 / count - sparsity) / sparsity

    around = max(1, int(1 / sparsity))
    low, high = int(around * (1 - TOLERANCE)), int((around + 1) * (1 + TOLERANCE))
    counts = sorted(range(max(1, low), high + 1), key=error)
    dividing = [c for c in counts if out_features % c == in_features % c == 0 and error(c) <= TOLERANCE]
    return (dividing or counts)[0]
