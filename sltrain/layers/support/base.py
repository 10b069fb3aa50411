"""The interface of a support, and products with an S that is made dense a slice of rows at a time.

Stored indices are compact; an operation decodes them to flat positions on the device, CHUNK_ENTRIES at a time
(`pieces`), without host synchronization.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

MAX_ENTRIES = 2**31 - 1  # of a matrix whose flat positions fit int32
CHUNK_ENTRIES = 2**21  # decoded to flat positions at a time
SHUFFLE_LIMIT = 4096  # up to this many positions a full shuffle is fastest
NUM_SLICES = 4  # S is made dense in this many slices, one after the other


class Support(ABC):
    """The support of S in an out x in matrix, before the random draw; made by `make_support`.

    A kind sets the numbers below in its `__init__`, defines how entries are drawn (`draw`) and decoded (`_flat`), and
    may override the products with faster ones. Raises ValueError for a sparsity outside [0, 1), and a matrix too large
    for int32 positions.
    """

    kind: ClassVar[str]
    price: ClassVar[str] = "entry"  # of one entry in a product: a field of cost.Costs
    piece_entry_bytes: ClassVar[int]  # memory of one entry while `pieces` decodes it

    index_dtype = torch.int32  # of what `draw` returns
    block: int | None = None  # block side, for a kind with blocks
    kernel_block: int | None = 0  # in the CPU kernel; 0 if that works entry by entry, None if it is not used
    max_rank: int | None = None  # of S, for a kind that limits it below full rank

    def __init__(self, out_features: int, in_features: int, sparsity: float, block_size: int | None = None) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(
                "sparsity is the fraction of the entries of S that are trained and must be in [0, 1), "
                f"got {sparsity}; the paper uses 0.03"
            )
        self.num_entries = out_features * in_features  # of the whole matrix
        if self.num_entries > MAX_ENTRIES:
            raise ValueError(
                f"a {out_features} x {in_features} matrix has more than {MAX_ENTRIES} entries, which int32 positions "
                "cannot number; split the layer, or keep it dense"
            )
        self.out_features, self.in_features, self.sparsity = out_features, in_features, sparsity
        self.block_size = block_size  # as typed; the one in use is `block`
        self.num_nonzero = int(sparsity * self.num_entries)  # trained entries
        self.num_indices = self.num_nonzero  # length of what `draw` returns

    @abstractmethod
    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw the support: (num_indices,) index_dtype on the CPU. `generator` is a CPU generator (None: torch's)."""

    @abstractmethod
    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        """Flat row-major positions of these entries, (n,) int32 or int64, a new tensor or a view of `indices`."""

    def positions(self, indices: Tensor) -> Tensor:
        """Flat row-major positions, (nnz,) int32, of the values in their order, on the device of `indices`. Distinct;
        sorted except for kinds block and rolled."""
        positions = torch.empty(self.num_nonzero, dtype=torch.int32, device=indices.device)
        for entries in self._chunks():
            positions[entries] = self._flat(indices, entries).to(torch.int32)
        return positions

    def pieces(self, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield n <= CHUNK_ENTRIES entries at a time, in order: which of them, and their flat positions (n,) int64. The
        number of pieces does not depend on the draw."""
        for entries in self._chunks():
            yield entries, self._flat(indices, entries).long()

    @property
    def piece_bytes(self) -> int:
        """Peak memory of `pieces`: a piece, what it is decoded from, and the piece before."""
        entries = next(self._chunks(), slice(0, 0))
        return self.piece_entry_bytes * (entries.stop - entries.start)

    def _chunks(self) -> Iterator[slice]:
        """The ranges of entries that `pieces` yields, at most CHUNK_ENTRIES long."""
        return slices(self.num_nonzero, CHUNK_ENTRIES)

    # ---- products with S, which sparse.py calls

    def to_kernel(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values and their places in the CPU kernel's layout."""
        return values, self.positions(indices)

    def from_kernel(self, indices: Tensor, grad_values: Tensor) -> Tensor:
        """Gradients in the CPU kernel's layout -> (nnz,)."""
        return grad_values

    def forward(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """x (N, in) -> x S^T, a new tensor (N, out), without the kernel."""
        y = x.new_empty((len(x), self.out_features))
        for rows in self._row_slices():
            y[:, rows] = x @ self._dense_rows(indices, values, rows, x.dtype).t()
        return y

    def backward(self, x: Tensor, grad: Tensor, indices: Tensor, values: Tensor, grad_x: Tensor) -> Tensor:
        """x (N, in), grad (N, out) -> dvalues (nnz,); adds grad S to grad_x (N, in). Without the kernel."""
        grad_values = torch.zeros_like(values)
        for rows in self._row_slices():
            part = grad[:, rows]
            grad_x.addmm_(part, self._dense_rows(indices, values, rows, x.dtype))
            grad_rows = (part.t() @ x).view(-1)
            for entries, slots, inside in self._slots(indices, rows):
                own = grad_rows[slots.clamp_(max=len(grad_rows) - 1)].to(grad_values.dtype)
                grad_values[entries] = torch.where(inside, own, grad_values[entries])
        return grad_values

    def temporary_bytes(self, num_rows: int, element_size: int) -> int:
        """Peak memory of `forward` and `backward` besides their arguments and results."""
        return 2 * self.num_entries * element_size // NUM_SLICES + self.piece_bytes  # a slice and its gradient

    def _row_slices(self) -> Iterator[slice]:
        """The slices of rows in which S is made dense."""
        return slices(self.out_features, -(-self.out_features // NUM_SLICES))

    def _slots(self, indices: Tensor, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As `pieces`: which values, the slot of each in these flattened rows, and whether it lies in them. Values of
        other rows get one slot after the last, so that the host needs no count."""
        size = (rows.stop - rows.start) * self.in_features
        for entries, positions in self.pieces(indices):
            slots = positions.sub_(rows.start * self.in_features)
            inside = (slots >= 0) & (slots < size)
            yield entries, torch.where(inside, slots, size), inside

    def _dense_rows(self, indices: Tensor, values: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        size = (rows.stop - rows.start) * self.in_features
        flat = torch.zeros(size + 1, dtype=dtype, device=values.device)
        for entries, slots, _ in self._slots(indices, rows):
            flat[slots] = values[entries].to(dtype)
        return flat[:size].view(-1, self.in_features)


def slices(count: int, step: int) -> Iterator[slice]:
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def lines_of(starts: Tensor, entries: slice) -> Tensor:
    """The line (row, block) of each of these entries, (n,), in the dtype of `starts`: the first entry of each line, and
    the number of entries."""
    counts = starts.clamp(entries.start, entries.stop).diff()  # of these entries in each line
    return torch.repeat_interleave(counts, output_size=entries.stop - entries.start)  # a known size: no host sync


def draw_distinct(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the numbers 0 .. population - 1, sorted int32, uniformly over all subsets of that size."""
    if population <= SHUFFLE_LIMIT:
        shuffled = torch.randperm(population, generator=generator, dtype=torch.int32, device="cpu")
        return shuffled[:count].sort().values
    if count > population // 2:  # fewer positions to drop than to keep
        everything = torch.arange(population, dtype=torch.int32, device="cpu")
        return _drop(everything, population - count, generator)

    drawn = torch.empty(0, dtype=torch.int32, device="cpu")
    while len(drawn) < count:
        # Draws expected until `count` are distinct (coupon collector), and a margin that makes a second round rare.
        expected = population * math.log((population - len(drawn)) / (population - count))
        num_draws = int(1.02 * expected) + 16
        fresh = torch.randint(population, (num_draws,), generator=generator, dtype=torch.int32, device="cpu")
        drawn = torch.unique(torch.cat([drawn, fresh]))
    # Truncating the sorted positions would favour small ones, so the surplus is dropped at random.
    return _drop(drawn, len(drawn) - count, generator)


def _drop(positions: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`positions` without `count` of them, chosen uniformly; the order is kept."""
    if count == 0:
        return positions
    kept = torch.ones(len(positions), dtype=torch.bool, device="cpu")
    kept[draw_distinct(len(positions), count, generator).long()] = False
    return positions[kept]
