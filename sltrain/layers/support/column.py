"""round(sparsity * in) whole columns, stored as their int32 numbers; values row after row.

S is a small dense matrix that multiplies the trained columns of x: N nnz multiply-adds on matrix units. The rank of W
is at most that of B A plus the number of columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sltrain.layers.support import base
from sltrain.layers.support.base import Support, draw_distinct


class ColumnSupport(Support):
    """Whole random columns."""

    kind = "column"
    price = "column_entry"
    piece_entry_bytes = 16
    kernel_block = None

    def __init__(self, out_features: int, in_features: int, sparsity: float, block_size: int | None = None) -> None:
        super().__init__(out_features, in_features, sparsity, block_size)
        self.num_columns = self.num_indices = self.max_rank = round(sparsity * in_features)
        self.num_nonzero = out_features * self.num_columns
        if sparsity == 0:
            raise ValueError(f"support={self.kind} needs sparsity above 0; for B A alone use support=uniform")
        if self.num_columns == 0:
            raise ValueError(
                f"support={self.kind} with sparsity {sparsity} trains no column of {in_features}; use sparsity "
                f"{1 / in_features:.2g} or more, or support=uniform"
            )

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        return draw_distinct(self.in_features, self.num_columns, generator)

    def _chunks(self) -> Iterator[slice]:
        """Whole rows of trained columns, at least one."""
        step = max(1, base.CHUNK_ENTRIES // self.num_columns) * self.num_columns
        return base.slices(self.num_nonzero, step)

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        rows = torch.arange(entries.start, entries.stop, self.num_columns, device=indices.device)
        return (rows.floor_divide_(self.num_columns).mul_(self.in_features)[:, None] + indices).flatten()

    def forward(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        return x.index_select(1, indices) @ self._matrix(values, x.dtype).t()

    def backward(self, x: Tensor, grad: Tensor, indices: Tensor, values: Tensor, grad_x: Tensor) -> Tensor:
        columns = indices.long()
        grad_x[:, columns] += grad @ self._matrix(values, x.dtype)
        return (grad.t() @ x.index_select(1, columns)).flatten().to(values.dtype)

    def temporary_bytes(self, num_rows: int, element_size: int) -> int:
        return self.num_columns * (num_rows + self.out_features) * element_size

    def _matrix(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.view(self.out_features, -1).to(dtype)
