"""One position in each of nnz equal strata of the flattened matrix, stored as its offset in its stratum.

Stratum k of n starts at floor(k * out * in / n). Offsets are uint8 up to strata of 256 entries, int32 beyond.
"""

import torch
from torch import Tensor

from sltrain.layers.support.base import Support


class StratifiedSupport(Support):
    """One random position in each stratum."""

    kind = "stratified"
    piece_entry_bytes = 16

    def __init__(self, out_features: int, in_features: int, sparsity: float, block_size: int | None = None) -> None:
        super().__init__(out_features, in_features, sparsity, block_size)
        fits = self.num_nonzero > 0 and -(-self.num_entries // self.num_nonzero) <= 256
        self.index_dtype = torch.uint8 if fits else torch.int32

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        offsets = torch.empty(self.num_nonzero, dtype=self.index_dtype, device="cpu")
        for strata in self._chunks():
            sizes = self._starts(slice(strata.start, strata.stop + 1), "cpu").diff()
            drawn = torch.rand(len(sizes), generator=generator, dtype=torch.float64, device="cpu")
            offsets[strata] = (drawn * sizes).to(self.index_dtype)  # towards zero: 0 .. size - 1
        return offsets

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        return self._starts(entries, indices.device).add_(indices[entries])

    def _starts(self, strata: slice, device: torch.device | str) -> Tensor:
        """First positions of these strata, (n,) int64; stratum nnz would start at the end of the matrix."""
        numbers = torch.arange(strata.start, strata.stop, device=device)
        return numbers.mul_(self.num_entries).floor_divide_(self.num_nonzero)
