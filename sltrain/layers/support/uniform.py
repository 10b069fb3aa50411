"""Every set of int(sparsity * out * in) positions is equally likely: the paper's support.

Up to 65,536 columns the support is stored as one uint16 tensor, 2 bytes an entry and 4 a row:

    2 (out + 1) words    where each row starts among the entries, and the end: int32, two words each
    nnz words            the column of each entry, row after row, ascending

One tensor, so that every kind has one buffer to pass, save and count. Wider matrices store int32 flat positions
(row * in + column), 4 bytes an entry.
"""

import torch
from torch import Tensor

from sltrain.layers.support.base import Support, draw_distinct, lines_of

MAX_COMPACT_COLUMNS = 2**16  # what uint16 can number


class UniformSupport(Support):
    """Uniformly random positions."""

    kind = "uniform"
    piece_entry_bytes = 20

    def __init__(self, out_features: int, in_features: int, sparsity: float, block_size: int | None = None) -> None:
        super().__init__(out_features, in_features, sparsity, block_size)
        self.is_compact = in_features <= MAX_COMPACT_COLUMNS and self.num_nonzero > 0  # row starts and uint16 columns
        if self.is_compact:
            self.index_dtype = torch.uint16
            self.num_indices += 2 * (out_features + 1)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        return self.at(draw_distinct(self.num_entries, self.num_nonzero, generator))

    def at(self, positions: Tensor) -> Tensor:
        """What `draw` returns if it draws these: flat row-major positions, (nnz,) int32, distinct, ascending, on the
        CPU."""
        if not self.is_compact:
            return positions
        firsts = torch.arange(self.out_features + 1, dtype=torch.int32, device="cpu") * self.in_features
        starts = torch.searchsorted(positions, firsts, out_int32=True)
        columns = (positions % self.in_features).to(torch.uint16)
        return torch.cat([starts.view(torch.uint16), columns])

    def free(self, positions: Tensor, numbers: Tensor) -> Tensor:
        """The positions outside of these, (nnz,) int64 and ascending, with these numbers among all outside, from 0."""
        before = positions - torch.arange(len(positions))  # how many lie outside before each
        return numbers + torch.searchsorted(before, numbers, right=True)

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        if not self.is_compact:
            return indices[entries]
        words = 2 * (self.out_features + 1)
        starts = indices[:words].view(torch.int32)
        columns = indices[words + entries.start : words + entries.stop].to(torch.int32)
        return lines_of(starts, entries).mul_(self.in_features).add_(columns)
