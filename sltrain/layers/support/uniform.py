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

    @property
    def num_indices(self) -> int:
        return self.num_nonzero + (self._num_start_words if self.is_compact else 0)

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.uint16 if self.is_compact else torch.int32

    @property
    def is_compact(self) -> bool:
        """Whether the support is stored as row starts and uint16 columns."""
        return self.in_features <= MAX_COMPACT_COLUMNS and self.num_nonzero > 0

    @property
    def _num_start_words(self) -> int:
        return 2 * (self.out_features + 1)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        positions = draw_distinct(self.num_entries, self.num_nonzero, generator)
        if not self.is_compact:
            return positions
        firsts = torch.arange(self.out_features + 1, dtype=torch.int32, device="cpu") * self.in_features
        starts = torch.searchsorted(positions, firsts, out_int32=True)
        columns = (positions % self.in_features).to(torch.uint16)
        return torch.cat([starts.view(torch.uint16), columns])

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        if not self.is_compact:
            return indices[entries]
        words = self._num_start_words
        starts = indices[:words].view(torch.int32)
        columns = indices[words + entries.start : words + entries.stop].to(torch.int32)
        return lines_of(starts, entries).mul_(self.in_features).add_(columns)
