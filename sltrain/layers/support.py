"""Which entries of S are trained: a support, drawn once and kept.

    kind         drawn                                         kept                        rank of B A + S
    uniform      int(sparsity * out * in) positions, every     int32 flat positions        full (the paper's
                 subset equally likely                         (row * in + column)         Proposition 1)
    stratified   one position in each of as many equal         its offset in its stratum,  full
                 strata of the flattened matrix                1 byte up to 256 entries
    block        b x b blocks: the block lines of the shorter  int32 block numbers         full
                 side hold k each, those of the longer side    (block row * number of
                 equally many, give or take one                block columns + column)
    column       round(sparsity * in) whole columns            int32 column numbers        at most rank + columns

`uniform` is the paper's (arXiv 2406.02214, section 3.2). The published code shuffles all out * in positions and keeps
the first few; here positions are drawn with replacement until enough are distinct, which costs memory and time for the
kept ones only and has exactly the same distribution. The other kinds are ours. `stratified` looks like it but needs a
quarter of the bytes. `block` and `column` trade some freedom of the support for small dense products. A regular
bipartite graph is a sum of permutations (König), so every block support contains a block permutation matrix, and that
alone has full rank; blocks thrown at random leave block rows empty and do not. Blocks and columns come in whole lines,
so their sparsity is the nearest that exists; blocks that stick out of a matrix whose sides they do not divide train
only what is inside.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KINDS = ("uniform", "stratified", "block", "column")
MAX_ENTRIES = 2**31 - 1  # the largest matrix whose flat positions fit int32
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
            return self._blocks_per_line * min(self.grid)
        return self.num_nonzero

    @property
    def index_dtype(self) -> torch.dtype:
        """Of what `draw` returns."""
        if self.kind != "stratified" or self.num_nonzero == 0:
            return torch.int32
        return torch.uint8 if -(-self.num_entries // self.num_nonzero) <= 256 else torch.int32

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw the support: (num_indices,) index_dtype on the CPU. `generator` is a CPU generator (None: torch's)."""
        if self.kind == "stratified":
            return self._draw_stratified(generator)
        if self.kind == "block":
            return self._draw_blocks(generator)
        if self.kind == "column":
            return _draw_distinct(self.in_features, self.num_columns, generator)
        return _draw_distinct(self.num_entries, self.num_nonzero, generator)

    def positions(self, indices: Tensor) -> Tensor:
        """Flat row-major positions, (nnz,) int32, of the values in their order, on the device of `indices`. Distinct;
        sorted but for kind block."""
        if self.kind == "uniform":
            return indices
        if self.kind == "stratified":
            return (self._strata(indices.device)[:-1] + indices).to(torch.int32)
        if self.kind == "column":
            rows = torch.arange(self.out_features, device=indices.device)[:, None]
            return (rows * self.in_features + indices).flatten().to(torch.int32)
        flat = self._block_positions(indices).flatten()
        return (flat if self.tiles else flat[self.inside(indices)]).to(torch.int32)

    # Strata

    def _strata(self, device: torch.device | str) -> Tensor:
        """First positions of the strata, and the end, (nnz + 1,) int64."""
        count = self.num_nonzero
        return torch.arange(count + 1, device=device) * self.num_entries // max(count, 1)

    def _draw_stratified(self, generator: torch.Generator | None) -> Tensor:
        sizes = self._strata("cpu").diff()
        drawn = torch.rand(self.num_nonzero, generator=generator, dtype=torch.float64, device="cpu")
        return (drawn * sizes).to(self.index_dtype)  # towards zero: 0 .. size - 1

    # Blocks

    @property
    def tiles(self) -> bool:
        """Whether the blocks divide both sides, so that none sticks out."""
        return self.out_features % self.block == 0 and self.in_features % self.block == 0

    @property
    def _blocks_per_line(self) -> int:
        """k: blocks in each block line of the shorter side."""
        return min(round(self.sparsity * self.longer), max(1, self.longer - 1))

    def _num_block_entries(self) -> int:
        """The entries inside the matrix. How many blocks lie in the last lines is fixed (`_draw_blocks`)."""
        size, (num_rows, num_columns) = self.block, self.grid
        missing_rows, missing_columns = num_rows * size - self.out_features, num_columns * size - self.in_features
        per_long_line = self.num_indices // self.longer
        in_last_row = self._blocks_per_line if num_rows <= num_columns else per_long_line
        in_last_column = self._blocks_per_line if num_columns < num_rows else per_long_line
        return self.num_indices * size * size - size * (missing_rows * in_last_row + missing_columns * in_last_column)

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

    def _block_positions(self, indices: Tensor) -> Tensor:
        """Flat positions of the entries of all blocks, (T, b, b) int64; meaningless where a block sticks out."""
        rows, columns = self._block_corners(indices)
        within = torch.arange(self.block, device=indices.device)
        return (rows[:, None, None] + within[:, None]) * self.in_features + columns[:, None, None] + within

    def inside(self, indices: Tensor) -> Tensor:
        """Places of the entries inside the matrix among those of all blocks, (nnz,) int64 of T * b * b, in order.

        Their number is known: numbering them spares the host from counting a mask on the GPU.
        """
        rows, columns = self._block_corners(indices)
        within = torch.arange(self.block, device=indices.device)
        row_fits = rows[:, None] + within < self.out_features  # (T, b)
        column_fits = columns[:, None] + within < self.in_features
        fits = (row_fits[:, :, None] & column_fits[:, None, :]).flatten()
        places = torch.zeros(self.num_nonzero + 1, dtype=torch.int64, device=indices.device)
        to = torch.where(fits, fits.cumsum(0) - 1, self.num_nonzero)  # what does not fit goes behind the others
        return places.scatter_(0, to, torch.arange(len(fits), device=indices.device))[: self.num_nonzero]


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
