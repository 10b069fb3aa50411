"""Which entries of S are trained: a support, drawn once and kept.

    kind         drawn                                         kept                        rank of B A + S
    uniform      int(sparsity * out * in) positions, every     row starts and uint16       full (the paper's
                 subset equally likely                         column numbers              Proposition 1)
    stratified   one position in each of as many equal         its offset in its stratum,  full
                 strata of the flattened matrix                1 byte up to 256 entries
    block        b x b blocks: the block lines of the shorter  int32 block numbers         full
                 side hold k each, those of the longer side    (block row * number of
                 equally many, give or take one                block columns + column)
    column       round(sparsity * in) whole columns            int32 column numbers        at most rank + columns

`uniform` is the paper's (arXiv 2406.02214, section 3.2). The published code shuffles all out * in positions and keeps
the first few; here positions are drawn with replacement until enough are distinct, which costs memory and time for the
kept ones only and has exactly the same distribution. The other kinds are ours. `stratified` looks like it but needs
half the bytes. `block` and `column` trade some freedom of the support for small dense products. A regular bipartite
graph is a sum of permutations (König), so every block support contains a block permutation matrix, and that alone has
full rank; blocks thrown at random leave block rows empty and do not. Blocks and columns come in whole lines, so their
sparsity is the nearest that exists; blocks that stick out of a matrix whose sides they do not divide train only what is
inside.

A uniform support of up to 65,536 columns is one uint16 tensor, 2 bytes an entry and 4 a row:

    2 (out + 1) words    where each row starts among the entries, and the end: int32, two words each
    nnz words            the column of each entry, row after row, ascending

One tensor, because then it is one buffer to pass on, save and count, whatever the kind. Beyond that width it is int32
flat positions (row * in + column), 4 bytes an entry.

Kept positions are compact; the flat ones that an operation needs are computed on the device, CHUNK_ENTRIES of them at a
time (`pieces`), and no step of that makes the host wait for a GPU.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("uniform", "stratified", "block", "column")
MAX_ENTRIES = 2**31 - 1  # the largest matrix whose flat positions fit int32
MAX_COMPACT_COLUMNS = 2**16  # what uint16 can number
CHUNK_ENTRIES = 2**21  # entries whose flat positions exist at a time
_PIECE_BYTES = {"uniform": 20, "stratified": 16, "block": 40, "column": 16}  # an entry, while they do
SHUFFLE_LIMIT = 4096  # up to this many positions a full shuffle is the fastest way
BLOCK_SIZES = (64, 32, 16, 8, 4, 2, 1)  # tried in this order: large blocks make efficient products
BLOCK_TOLERANCE = 0.1  # a block size is taken if its sparsity is this near, relatively, to the one asked for


@dataclass(frozen=True)
class Support:
    """The support of S in an out x in matrix, all but the random draw.

    `sparsity` is the paper's delta, the fraction of the entries that are trained. `block_size` is for kind block; None:
    the largest that fits `sparsity` well. Raises ValueError for an unknown kind, a sparsity outside [0, 1) or one that
    the kind cannot have, a block larger than the matrix, and a matrix too large for int32 positions.
    """

    out_features: int
    in_features: int
    sparsity: float
    kind: str = "uniform"
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown support {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                "sparsity is the fraction of the entries of S that are trained and must be in [0, 1), "
                f"got {self.sparsity}; the paper uses 0.03"
            )
        if self.num_entries > MAX_ENTRIES:
            raise ValueError(
                f"a {self.out_features} x {self.in_features} matrix has more than {MAX_ENTRIES} entries, which int32 "
                "positions cannot number; split the layer, or leave it dense"
            )
        if self.kind in ("block", "column") and self.sparsity == 0:
            raise ValueError(f"support={self.kind} needs sparsity above 0; for B A alone use support=uniform")
        if self.kind == "column" and round(self.sparsity * self.in_features) == 0:
            least = 1 / self.in_features
            raise ValueError(
                f"support=column with sparsity {self.sparsity} trains no column of {self.in_features}; use sparsity "
                f"{least:.2g} or more, or support=uniform"
            )
        if self.kind == "block":
            self._check_blocks()

    def _check_blocks(self) -> None:
        size = self.block
        shape = f"{self.out_features} x {self.in_features}"
        if not 1 <= size <= min(self.out_features, self.in_features):
            raise ValueError(
                f"block_size={size} does not fit into a {shape} matrix; use at most "
                f"{min(self.out_features, self.in_features)}, or leave it out"
            )
        if self.sparsity > 0.5:
            raise ValueError(f"support=block takes sparsity up to 0.5, got {self.sparsity}; use support=uniform")
        if round(self.sparsity * self.longer) == 0:
            raise ValueError(
                f"one block of {size} x {size} a block line is a sparsity of {1 / self.longer:.2g} in a {shape} matrix "
                f"already, {self.sparsity} was asked for; use a smaller block_size, or support=uniform"
            )

    @property
    def num_entries(self) -> int:
        """Entries of the whole matrix."""
        return self.out_features * self.in_features

    @cached_property
    def block(self) -> int:
        """Block side b: the one given, or the largest of BLOCK_SIZES whose sparsity is near."""
        if self.block_size is not None:
            return self.block_size
        longer = max(self.out_features, self.in_features)

        def error(size: int) -> float:
            lines = -(-longer // size)
            return abs(round(self.sparsity * lines) / lines - self.sparsity) / self.sparsity

        sizes = [size for size in BLOCK_SIZES if size <= min(self.out_features, self.in_features)]
        fitting = [size for size in sizes if round(self.sparsity * -(-longer // size)) > 0] or [1]
        return next((size for size in fitting if error(size) <= BLOCK_TOLERANCE), min(fitting, key=error))

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns, those that stick out included."""
        return -(-self.out_features // self.block), -(-self.in_features // self.block)

    @property
    def longer(self) -> int:
        """Block lines of the longer side."""
        return max(self.grid)

    @property
    def num_columns(self) -> int:
        """Columns that kind column trains."""
        return round(self.sparsity * self.in_features)

    @cached_property
    def num_nonzero(self) -> int:
        """Trained entries."""
        if self.kind == "column":
            return self.out_features * self.num_columns
        if self.kind == "block":
            return self._num_block_entries()
        return int(self.sparsity * self.num_entries)

    @property
    def num_indices(self) -> int:
        """Length of what `draw` returns."""
        if self.kind == "column":
            return self.num_columns
        if self.kind == "block":
            return self._num_blocks
        return self.num_nonzero + (self._num_start_words if self.is_compact else 0)

    @property
    def index_dtype(self) -> torch.dtype:
        """Of what `draw` returns."""
        if self.is_compact:
            return torch.uint16
        if self.kind != "stratified" or self.num_nonzero == 0:
            return torch.int32
        return torch.uint8 if -(-self.num_entries // self.num_nonzero) <= 256 else torch.int32

    @property
    def is_compact(self) -> bool:
        """Whether the support is kept as row starts and uint16 columns."""
        return self.kind == "uniform" and self.in_features <= MAX_COMPACT_COLUMNS and self.num_nonzero > 0

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw the support: (num_indices,) index_dtype on the CPU. `generator` is a CPU generator (None: torch's)."""
        if self.kind == "stratified":
            return self._draw_stratified(generator)
        if self.kind == "block":
            return self._draw_blocks(generator)
        if self.kind == "column":
            return _draw_distinct(self.in_features, self.num_columns, generator)
        positions = _draw_distinct(self.num_entries, self.num_nonzero, generator)
        return self._compress(positions) if self.is_compact else positions

    def positions(self, indices: Tensor) -> Tensor:
        """Flat row-major positions, (nnz,) int32, of the values in their order, on the device of `indices`. Distinct;
        sorted but for kind block. What can work piece by piece asks for `pieces`."""
        positions = torch.empty(self.num_nonzero, dtype=torch.int32, device=indices.device)
        for entries in self._chunks():
            positions[entries] = self._flat(indices, entries).to(torch.int32)
        return positions

    def pieces(self, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The values in order, some at a time: which of them, n <= CHUNK_ENTRIES, and their flat positions (n,) int64.
        How many pieces there are depends on the support alone, not on the draw."""
        for entries in self._chunks():
            yield entries, self._flat(indices, entries).long()

    @property
    def piece_bytes(self) -> int:
        """The most that `pieces` holds at a time: a piece, what it is computed from, and the piece before."""
        entries = next(self._chunks(), slice(0, 0))
        return _PIECE_BYTES[self.kind] * (entries.stop - entries.start)

    def _chunks(self) -> Iterator[slice]:
        """All entries, at most CHUNK_ENTRIES at a time; of kind column whole rows, one at least."""
        step = CHUNK_ENTRIES
        if self.kind == "column":
            step = max(1, CHUNK_ENTRIES // self.num_columns) * self.num_columns
        for first in range(0, self.num_nonzero, step):
            yield slice(first, min(first + step, self.num_nonzero))

    def _flat(self, indices: Tensor, entries: slice) -> Tensor:
        """Flat positions of these entries, (n,) int32 or int64."""
        if self.kind == "stratified":
            return self._stratum_starts(entries, indices.device).add_(indices[entries])
        if self.kind == "column":
            rows = torch.arange(entries.start, entries.stop, self.num_columns, device=indices.device)
            return (rows.floor_divide_(self.num_columns).mul_(self.in_features)[:, None] + indices).flatten()
        if self.kind == "block":
            blocks, rows, columns = self._block_places(indices, entries)
            first_rows, first_columns = self._block_corners(indices)
            rows.add_(first_rows[blocks]).mul_(self.in_features)
            return rows.add_(first_columns[blocks]).add_(columns)
        return self._decompress(indices, entries) if self.is_compact else indices[entries]

    # Row starts and columns

    @property
    def _num_start_words(self) -> int:
        return 2 * (self.out_features + 1)

    def _compress(self, positions: Tensor) -> Tensor:
        """Sorted flat positions (nnz,) int32 -> row starts and columns, (num_indices,) uint16."""
        firsts = torch.arange(self.out_features + 1, dtype=torch.int32, device="cpu") * self.in_features
        starts = torch.searchsorted(positions, firsts, out_int32=True)
        columns = (positions % self.in_features).to(torch.uint16)
        return torch.cat([starts.view(torch.uint16), columns])

    def _decompress(self, indices: Tensor, entries: slice) -> Tensor:
        """Flat positions of these entries, (n,) int32."""
        words = self._num_start_words
        starts = indices[:words].view(torch.int32)
        columns = indices[words + entries.start : words + entries.stop].to(torch.int32)
        return _lines(starts, entries).mul_(self.in_features).add_(columns)

    # Strata

    def _stratum_starts(self, strata: slice, device: torch.device | str) -> Tensor:
        """First positions of these strata, (n,) int64; the one behind the last starts at the end of the matrix."""
        numbers = torch.arange(strata.start, strata.stop, device=device)
        return numbers.mul_(self.num_entries).floor_divide_(self.num_nonzero)

    def _draw_stratified(self, generator: torch.Generator | None) -> Tensor:
        offsets = torch.empty(self.num_nonzero, dtype=self.index_dtype, device="cpu")
        for strata in self._chunks():
            sizes = self._stratum_starts(slice(strata.start, strata.stop + 1), "cpu").diff()
            drawn = torch.rand(len(sizes), generator=generator, dtype=torch.float64, device="cpu")
            offsets[strata] = (drawn * sizes).to(self.index_dtype)  # towards zero: 0 .. size - 1
        return offsets

    # Blocks

    @property
    def tiles(self) -> bool:
        """Whether the blocks divide both sides, so that none sticks out."""
        return self.out_features % self.block == 0 and self.in_features % self.block == 0

    @property
    def _blocks_per_line(self) -> int:
        """k: blocks in each block line of the shorter side."""
        return min(round(self.sparsity * self.longer), max(1, self.longer - 1))

    @property
    def _num_blocks(self) -> int:
        return self._blocks_per_line * min(self.grid)

    def _num_block_entries(self) -> int:
        """The entries inside the matrix. How many blocks lie in the last lines is fixed (`_draw_blocks`)."""
        size, (num_rows, num_columns) = self.block, self.grid
        missing_rows, missing_columns = num_rows * size - self.out_features, num_columns * size - self.in_features
        per_long_line = self._num_blocks // self.longer
        in_last_row = self._blocks_per_line if num_rows <= num_columns else per_long_line
        in_last_column = self._blocks_per_line if num_columns < num_rows else per_long_line
        return self._num_blocks * size * size - size * (missing_rows * in_last_row + missing_columns * in_last_column)

    def _draw_blocks(self, generator: torch.Generator | None) -> Tensor:
        """Sorted block numbers, uniformly paired lines, then pairs that come twice are mended by swaps.

        If the blocks do not divide a side, its last line gets no extra block and the corner stays empty, so that the
        number of trained entries does not depend on the draw.
        """
        shorter, longer, per_line = min(self.grid), self.longer, self._blocks_per_line
        count = shorter * per_line
        candidates = torch.randperm(longer if self.tiles else longer - 1, generator=generator, device="cpu")
        extra = candidates[: count % longer]
        balanced = torch.cat([torch.arange(longer, device="cpu").repeat(count // longer), extra])
        of_longer = balanced[torch.randperm(count, generator=generator, device="cpu")].tolist()
        of_shorter = [line for line in range(shorter) for _ in range(per_line)]
        corner = None if self.tiles else (shorter - 1, longer - 1)
        _mend_pairs(of_shorter, of_longer, corner, generator)
        num_rows, num_columns = self.grid
        rows, columns = (of_shorter, of_longer) if num_rows <= num_columns else (of_longer, of_shorter)
        numbers = sorted(row * num_columns + column for row, column in zip(rows, columns, strict=True))
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")

    def _block_corners(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """First row and first column of each block, (T,) int64."""
        numbers = indices.long()
        return numbers // self.grid[1] * self.block, numbers % self.grid[1] * self.block

    def _block_places(self, indices: Tensor, entries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The block of each of these entries, and its row and column inside the block, three times (n,) int64.

        What sticks out of the matrix is no entry. How many entries each block has is computed on the device.
        """
        first_rows, first_columns = self._block_corners(indices)
        heights = (self.out_features - first_rows).clamp(max=self.block)  # (T,)
        widths = (self.in_features - first_columns).clamp(max=self.block)
        starts = F.pad((heights * widths).cumsum(0), (1, 0))  # (T + 1,)
        blocks = _lines(starts, entries)
        numbers = torch.arange(entries.start, entries.stop, device=indices.device)
        numbers -= starts[blocks]
        width = widths[blocks]
        return blocks, numbers // width, numbers.remainder_(width)

    def pieces_in_blocks(self, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """As `pieces`, with places among the entries of all blocks, T * b * b, instead of positions in the matrix."""
        for entries in self._chunks():
            blocks, rows, columns = self._block_places(indices, entries)
            yield entries, blocks.mul_(self.block).add_(rows).mul_(self.block).add_(columns)


def _lines(starts: Tensor, entries: slice) -> Tensor:
    """Which line (row, block) each of these entries lies in, (n,), for lines that start at the entries `starts` and end
    where the next one starts; the dtype is that of `starts`."""
    counts = starts.clamp(entries.start, entries.stop).diff()  # of these entries in each line
    # Their sum is known here: a GPU need not be asked, and waited for.
    return torch.repeat_interleave(counts, output_size=entries.stop - entries.start)


def _mend_pairs(
    first: list[int], second: list[int], forbidden: tuple[int, int] | None, generator: torch.Generator | None
) -> None:
    """Swap entries of `second`, in place, until all pairs (first[i], second[i]) are distinct and none is
    `forbidden`. No swap makes a pair that is there already, so every one leaves fewer to mend; at most half of all
    possible pairs are taken, so there are always some to swap with."""
    taken: dict[tuple[int, int], int] = {}
    for pair in zip(first, second, strict=True):
        taken[pair] = taken.get(pair, 0) + 1

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
        if second[i] == second[j] or first[i] == first[j] or any(taken.get(p) or p == forbidden for p in new):
            continue
        for pair in ((first[i], second[i]), (first[j], second[j])):
            taken[pair] -= 1
        for pair in new:
            taken[pair] = 1
        second[i], second[j] = second[j], second[i]


def _draw_distinct(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the numbers 0 .. population - 1, sorted int32, uniformly over all subsets of that size."""
    if population <= SHUFFLE_LIMIT:
        shuffled = torch.randperm(population, generator=generator, dtype=torch.int32, device="cpu")
        return shuffled[:count].sort().values
    if count > population // 2:  # fewer positions to leave out than to keep
        everything = torch.arange(population, dtype=torch.int32, device="cpu")
        return _leave_out(everything, population - count, generator)

    drawn = torch.empty(0, dtype=torch.int32, device="cpu")
    while len(drawn) < count:
        # Draws expected until `count` are distinct (coupon collector), with a margin that makes a second round rare.
        expected = population * math.log((population - len(drawn)) / (population - count))
        num_draws = int(1.02 * expected) + 16
        fresh = torch.randint(population, (num_draws,), generator=generator, dtype=torch.int32, device="cpu")
        drawn = torch.unique(torch.cat([drawn, fresh]))
    # Cutting the end off would favour small positions: the surplus is left out uniformly.
    return _leave_out(drawn, len(drawn) - count, generator)


def _leave_out(positions: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`positions` without `count` of them, chosen uniformly; the order is kept."""
    if count == 0:
        return positions
    kept = torch.ones(len(positions), dtype=torch.bool, device="cpu")
    kept[_draw_distinct(len(positions), count, generator).long()] = False
    return positions[kept]
