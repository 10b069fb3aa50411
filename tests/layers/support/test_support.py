"""Supports: distinct positions, the announced size and rank, uniform distributions, cheap draws."""

import math
import weakref
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain.layers.support import KINDS, make_support
from sltrain.layers.support import base as support_module
from sltrain.layers.support import uniform as uniform_module
from sltrain.layers.support.base import draw_distinct


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 120),
    columns=st.integers(1, 120),
    sparsity=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_positions_are_sorted_distinct_in_range_and_as_many_as_promised(rows, columns, sparsity, seed):
    support = make_support(rows, columns, sparsity)
    indices = support.draw(generator(seed))
    positions = support.positions(indices)
    assert positions.dtype == torch.int32
    assert len(positions) == int(sparsity * rows * columns) == support.num_nonzero
    assert (positions[1:] > positions[:-1]).all()
    if len(positions):
        assert positions[0] >= 0 and positions[-1] < rows * columns
        assert indices.nbytes == 2 * len(positions) + 4 * (rows + 1)
    assert torch.equal(indices, make_support(rows, columns, sparsity).draw(generator(seed)))


def drawn_plainly(population, count, source):
    """A uniform draw with Python's sets, as when positions were stored flat: a seed still gives the same support."""
    if population <= 4096:
        return set(torch.randperm(population, generator=source, dtype=torch.int32)[:count].tolist())
    drawn = set()
    if count > population // 2:
        drawn = set(range(population))
    while len(drawn) < count:
        num_draws = int(1.02 * population * math.log((population - len(drawn)) / (population - count))) + 16
        drawn |= set(torch.randint(population, (num_draws,), generator=source, dtype=torch.int32).tolist())
    surplus = drawn_plainly(len(drawn), len(drawn) - count, source) if len(drawn) > count else set()
    return {position for number, position in enumerate(sorted(drawn)) if number not in surplus}


@pytest.mark.parametrize("sparsity", [0.001, 0.03, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("shape", [(60, 50), (200, 301), (3, 65536), (2, 65537)], ids=str)
def test_a_seed_gives_the_positions_it_always_gave(shape, sparsity):
    support = make_support(*shape, sparsity)
    expected = sorted(drawn_plainly(support.num_entries, support.num_nonzero, generator(7)))
    assert support.positions(support.draw(generator(7))).tolist() == expected


@pytest.mark.parametrize("chunk", [97, 2**21])
@pytest.mark.parametrize("shape", [(60, 50), (300, 401)], ids=str)
def test_a_seed_gives_the_offsets_it_always_gave(shape, chunk, monkeypatch):
    """In float64, one number a stratum, rounded down; drawing in pieces changes nothing."""
    monkeypatch.setattr(support_module, "CHUNK_ENTRIES", chunk)
    support = make_support(*shape, 0.07, "stratified")
    count, entries = support.num_nonzero, support.num_entries
    starts = [k * entries // count for k in range(count + 1)]
    drawn = torch.rand(count, generator=generator(3), dtype=torch.float64).tolist()
    expected = [a + math.floor(u * (b - a)) for u, a, b in zip(drawn, starts[:-1], starts[1:], strict=True)]
    assert support.positions(support.draw(generator(3))).tolist() == expected


def chosen_positions(support, positions):
    """The result of `draw` if it draws these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform_module, "draw_distinct", lambda *_: positions.int())
        return support.draw()


def test_positions_survive_where_uint16_ends(monkeypatch):
    """65,536 columns: the first and the last of each row, an empty row at either end and in the middle, a full row. One
    column more does not fit any more."""
    columns = 65536
    full = torch.arange(columns) + 2 * columns
    ends = torch.tensor([columns, 2 * columns - 1, 4 * columns - 1, 4 * columns])
    positions = torch.cat([full, ends]).sort().values  # rows 1 to 4 of 0 to 5; row 3 has its last column alone
    support = make_support(6, columns, len(positions) / (6 * columns))
    assert support.num_nonzero == len(positions)
    indices = chosen_positions(support, positions)
    assert (indices.dtype, len(indices)) == (torch.uint16, support.num_indices) == (torch.uint16, len(positions) + 14)
    assert torch.equal(support.positions(indices).long(), positions)
    assert indices[:14].view(torch.int32).tolist() == [0, 0, 2, 65538, 65539, 65540, 65540]
    monkeypatch.setattr(support_module, "CHUNK_ENTRIES", 1000)
    assert torch.equal(support.positions(indices).long(), positions)
    wide = make_support(6, columns + 1, 0.1)
    assert wide.index_dtype == torch.int32 and wide.num_indices == wide.num_nonzero
    assert make_support(6, columns, 0.0).draw().tolist() == []


def test_a_file_keeps_the_positions(tmp_path):
    support = make_support(300, 401, 0.1)
    indices = support.draw(generator())
    save_file({"indices": indices}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size <= 2 * support.num_nonzero + 4 * 301 + 200  # the header
    loaded = load_file(tmp_path / "model.safetensors")["indices"]
    assert loaded.dtype == torch.uint16 and torch.equal(support.positions(loaded), support.positions(indices))


PIECE_SHAPES = [("uniform", 0.1), ("uniform", 0.9), ("stratified", 0.1), ("block", 0.1)]
PIECE_SHAPES += [("column", 0.1), ("slice", 0.1), ("rolled", 0.1)]


@pytest.mark.parametrize("chunk", [3, 64, 500, 2**21])
@pytest.mark.parametrize("shape", [(96, 64), (37, 61), (130, 75)], ids=str)
@pytest.mark.parametrize(("kind", "sparsity"), PIECE_SHAPES)
def test_pieces_are_all_values_once_in_order_within_the_bound(kind, sparsity, shape, chunk, monkeypatch):
    support = make_support(*shape, sparsity, kind)
    indices = support.draw(generator())
    whole = support.positions(indices)
    monkeypatch.setattr(support_module, "CHUNK_ENTRIES", chunk)
    pieces = list(support.pieces(indices))
    assert [entry for entries, _ in pieces for entry in range(entries.start, entries.stop)] == list(range(len(whole)))
    row = getattr(support, "num_columns", 1)
    assert all(0 < len(positions) <= max(chunk, row) and positions.dtype == torch.int64 for _, positions in pieces)
    assert torch.equal(torch.cat([positions for _, positions in pieces]), whole.long())
    assert torch.equal(support.positions(indices), whole)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made meanwhile held at a time."""

    def __init__(self):
        super().__init__()
        self.now, self.most = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inside = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inside:
            size = result.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(result, self.release, size)
        return result

    def release(self, size):
        self.now -= size


@pytest.mark.parametrize("kind", KINDS)
def test_wide_positions_exist_for_a_piece_at_a_time(kind, monkeypatch):
    """The announced peak is the measured one, and does not grow with the matrix."""
    monkeypatch.setattr(support_module, "CHUNK_ENTRIES", 2**14)
    for rows in (512, 1024):
        support = make_support(rows, 2048, 0.1, kind)
        indices = support.draw(generator())
        with LiveBytes() as pieces:
            for _ in support.pieces(indices):
                pass
        assert 0.8 * support.piece_bytes < pieces.most < 1.1 * support.piece_bytes
        assert support.piece_bytes <= 40 * 2**14
        with LiveBytes() as whole:
            support.positions(indices)
        assert whole.most < 4 * support.num_nonzero + 1.1 * support.piece_bytes
    assert make_support(8, 8, 0.0).piece_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_positions_are_known_without_them(kind):
    """On meta, as under torch.compile: nothing depends on the draw."""
    support = make_support(37, 61, 0.1, kind)
    indices = torch.empty(support.num_indices, dtype=support.index_dtype, device="meta")
    assert support.positions(indices).shape == (support.num_nonzero,)
    assert [positions.device.type for _, positions in support.pieces(indices)] == ["meta"]


@pytest.mark.parametrize("limit", [7, 8])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7])
def test_every_subset_is_equally_likely(count, limit, monkeypatch):
    """Chi-square over all subsets of 8 positions, by the code for large matrices (limit 7) and for small ones (8)."""
    monkeypatch.setattr(support_module, "SHUFFLE_LIMIT", limit)
    source, num_draws = generator(count), 3000
    seen = dict.fromkeys(combinations(range(8), count), 0)
    for _ in range(num_draws):
        seen[tuple(draw_distinct(8, count, source).tolist())] += 1
    assert_uniform(list(seen.values()), num_draws / math.comb(8, count))


@pytest.mark.parametrize(
    "kind, sparsity",
    [("uniform", 0.003), ("uniform", 0.05), ("uniform", 0.4), ("uniform", 0.6), ("uniform", 0.97)]
    + [("stratified", 0.03), ("stratified", 0.3)],
)
def test_no_region_of_a_large_matrix_is_favoured(kind, sparsity):
    """Cutting sorted positions off would empty the last rows: blocks of positions and of columns are counted."""
    rows, columns, num_draws = 256, 128, 40
    source = generator(1)
    support = make_support(rows, columns, sparsity, kind)
    drawn = torch.cat([support.positions(support.draw(source)) for _ in range(num_draws)])
    expected = num_draws * support.num_nonzero / 64
    assert_uniform(torch.bincount(drawn // (rows * columns // 64), minlength=64).tolist(), expected)
    assert_uniform(torch.bincount(drawn % columns // 2, minlength=64).tolist(), expected)


def assert_uniform(counts, expected):
    """Pearson's statistic within 4.5 standard deviations of its mean (draws without replacement make it smaller)."""
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    freedom = len(counts) - 1
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_drawing_for_a_7b_projection_costs_what_is_kept_not_the_matrix():
    with LiveBytes() as drawing:
        indices = make_support(4096, 11008, 0.05).draw(generator())
    assert drawing.most < 4096 * 11008, "less than a byte for each position; shuffling all of them takes 8"
    assert indices.nbytes == 2 * int(0.05 * 4096 * 11008) + 4 * 4097


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 3, math.nan])
def test_a_sparsity_outside_the_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity .* must be in \[0, 1\)"):
        make_support(4, 4, sparsity)


def test_a_matrix_beyond_int32_is_refused():
    with pytest.raises(ValueError, match="more than 2147483647 entries"):
        make_support(2**16, 2**15, 0.01)
    assert make_support(2**16, 2**15 - 1, 0.0).num_nonzero == 0


SHAPES = [(96, 96), (172, 64), (64, 172), (128, 342), (37, 61), (130, 75), (1, 8), (9, 5)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.03, 0.1, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_what_it_announces(kind, shape, sparsity, seed):
    """Counts and dtype are known before the draw, positions are distinct and inside, the draw repeats."""
    rows, columns = shape
    try:
        support = make_support(rows, columns, sparsity, kind)
    except ValueError as error:
        few = sparsity * max(shape) < 1 or (kind == "rolled" and round(1 / sparsity) > min(shape))
        assert kind not in ("uniform", "stratified") and few, error
        return
    indices = support.draw(generator(seed))
    positions = support.positions(indices)
    assert (len(indices), indices.dtype) == (support.num_indices, support.index_dtype)
    assert len(positions) == support.num_nonzero == len(positions.unique())
    assert positions.dtype == torch.int32
    assert ((positions >= 0) & (positions < rows * columns)).all()
    assert kind in ("block", "rolled") or (positions.diff() > 0).all()
    assert torch.equal(indices, support.draw(generator(seed)))


RANKS = {"uniform": 512, "stratified": 512, "block": 512, "rolled": 512, "column": 143, "slice": 143}


@pytest.mark.parametrize(("kind", "rank"), RANKS.items())
def test_the_rank_of_the_papers_square_projection(kind, rank):
    """512 x 512, rank 128, 3 %: a uniform S completes B A to full rank with high probability, a block permutation
    always, 15 columns add 15."""
    support = make_support(512, 512, 0.03, kind)
    for seed in range(2):
        weight = torch.randn(512, 128, dtype=torch.float64, generator=generator(seed)) @ torch.randn(
            128, 512, dtype=torch.float64, generator=generator(seed + 10)
        )
        sparse = torch.zeros(512 * 512, dtype=torch.float64)
        positions = support.positions(support.draw(generator(seed))).long()
        sparse[positions] = torch.randn(len(positions), dtype=torch.float64, generator=generator(seed + 20))
        assert torch.linalg.matrix_rank(weight + sparse.view(512, 512)) == rank


def test_a_stratum_holds_one_position_in_one_byte():
    support = make_support(300, 401, 0.03, "stratified")
    indices = support.draw(generator())
    positions, count = support.positions(indices).long(), support.num_nonzero
    assert indices.dtype == torch.uint8 and indices.element_size() * count == count == int(0.03 * 300 * 401)
    starts = torch.arange(count) * (300 * 401) // count
    ends = torch.cat([starts[1:], torch.tensor([300 * 401])])
    assert ((positions >= starts) & (positions < ends)).all()
    assert make_support(300, 401, 0.003, "stratified").index_dtype == torch.int32  # strata of more than 256


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_on_the_cpu_whatever_the_default_device(kind):
    support = make_support(64, 64, 0.1, kind)
    with torch.device("meta"):
        indices = support.draw(generator())
    assert torch.equal(indices, support.draw(generator()))


@pytest.mark.parametrize("shape", [(96, 96), (172, 64), (64, 172), (130, 75)], ids=str)
@pytest.mark.parametrize("block", [4, 8])
def test_blocks_are_spread_evenly_over_rows_and_columns(shape, block):
    support = make_support(*shape, 0.1, "block", block)
    num_rows, num_columns = support.grid
    numbers = support.draw(generator(3)).long()
    per_row = torch.bincount(numbers // num_columns, minlength=num_rows)
    per_column = torch.bincount(numbers % num_columns, minlength=num_columns)
    shorter, longer = (per_row, per_column) if num_rows <= num_columns else (per_column, per_row)
    assert shorter.min() == shorter.max() >= 1
    assert longer.max() - longer.min() <= (1 if num_rows != num_columns else 0)


def test_a_slice_is_a_run_of_columns_from_anywhere():
    support, source = make_support(5, 12, 0.25, "slice"), generator(4)
    draws = [tuple(support.draw(source).tolist()) for _ in range(1200)]
    runs = [tuple(sorted((first + k) % 12 for k in range(3))) for first in range(12)]
    assert set(draws) == set(runs)
    assert_uniform([draws.count(run) for run in runs], 100)


@pytest.mark.parametrize("shape", [(96, 96), (172, 64), (64, 172), (61, 37), (12, 12)], ids=str)
@pytest.mark.parametrize("sparsity", [0.09, 0.3, 0.5])
def test_a_rolled_support_is_a_block_diagonal_that_numpy_rolls(shape, sparsity):
    support = make_support(*shape, sparsity, "rolled")
    count, mask = support.num_blocks, np.zeros(shape, dtype=bool)
    for k in range(count):
        rows, columns = (slice(k * side // count, (k + 1) * side // count) for side in shape)
        mask[rows, columns] = True
    for seed in range(3):
        indices = support.draw(generator(seed))
        wanted = np.roll(mask, int(indices[0]), axis=1)
        found = np.zeros(shape, dtype=bool)
        found.flat[support.positions(indices).numpy()] = True
        assert np.array_equal(found, wanted)
    for line in (mask.sum(0), mask.sum(1)):  # a row or a column has as many as any other, give or take one
        assert line.min() >= 1 and line.max() - line.min() <= 1


def test_every_offset_of_a_block_diagonal_is_equally_likely():
    support, source = make_support(12, 12, 0.25, "rolled"), generator(6)
    offsets = [int(support.draw(source)[0]) for _ in range(1200)]
    assert_uniform([offsets.count(offset) for offset in range(12)], 100)


@pytest.mark.parametrize("size", [512, 1024, 2048, (1376, 512), (2736, 1024), (5461, 2048), (11008, 4096)])
@pytest.mark.parametrize("sparsity", [0.03, 0.05])
def test_blocks_of_a_diagonal_give_the_papers_sparsity(size, sparsity):
    rows, columns = size if isinstance(size, tuple) else (size, size)
    support = make_support(rows, columns, sparsity, "rolled")
    assert support.num_nonzero / (rows * columns) == pytest.approx(sparsity, rel=0.1)
    assert support.tiles == any(
        rows % count == columns % count == 0 and abs(1 / count - sparsity) <= 0.1 * sparsity for count in range(1, 99)
    )


def test_every_block_permutation_is_equally_likely():
    support, source = make_support(16, 16, 0.25, "block", 4), generator(5)  # one block in each of four block rows
    draws = [tuple(support.draw(source).tolist()) for _ in range(1200)]
    assert_uniform([draws.count(one) for one in set(draws)] + [0] * (24 - len(set(draws))), 1200 / 24)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    sparsity=st.floats(0.01, 0.5),
    block=st.sampled_from([None, 1, 2, 3, 4, 8]),
    seed=st.integers(0, 2**31),
)
def test_block_supports_of_any_shape_are_drawn(rows, columns, sparsity, block, seed):
    try:
        support = make_support(rows, columns, sparsity, "block", block)
    except ValueError:
        return
    indices = support.draw(generator(seed))
    positions = support.positions(indices)
    assert len(indices.unique()) == len(indices) == support.num_indices
    assert len(positions.unique()) == support.num_nonzero
    assert positions.max() < rows * columns


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096, (1376, 512), (2736, 1024), (5461, 2048), (11008, 4096)])
def test_the_block_size_gives_the_papers_sparsity_within_a_tenth(size):
    rows, columns = size if isinstance(size, tuple) else (size, size)
    for shape in ((rows, columns), (columns, rows)):
        support = make_support(*shape, 0.03, "block")
        assert support.block >= 8
        assert support.num_nonzero / (rows * columns) == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 0.5, "banded"), "unknown support 'banded': choose one of uniform, stratified, block, column, slice"),
        ((64, 64, 0.0, "block"), "support=block needs sparsity above 0"),
        ((64, 64, 0.0, "column"), "support=column needs sparsity above 0"),
        ((64, 8, 0.03, "column"), "support=column with sparsity 0.03 trains no column of 8; use sparsity 0.12 or more"),
        ((64, 32, 0.03, "block", 33), "block_size=33 does not fit into a 64 x 32 matrix; use at most 32"),
        ((64, 64, 0.03, "block", 32), "less than one 32 x 32 block a block line of a 64 x 64 matrix, which is 0.5"),
        ((64, 64, 0.0, "slice"), "support=slice needs sparsity above 0"),
        ((64, 8, 0.03, "slice"), "support=slice with sparsity 0.03 trains no column of 8; use sparsity 0.12 or more"),
        ((64, 64, 0.0, "rolled"), "support=rolled needs sparsity above 0"),
        ((64, 64, 0.8, "rolled"), "sparsity 0.8 is one block, all of a 64 x 64 matrix; use sparsity up to 0.5"),
        ((64, 16, 1e-310, "rolled"), "makes more blocks than a 64 x 16 matrix can have; use sparsity 0.062 or more"),
        ((64, 16, 0.03, "rolled"), "makes more blocks than a 64 x 16 matrix can have; use sparsity 0.062 or more"),
        ((64, 64, 0.6, "block"), "support=block takes sparsity up to 0.5, got 0.6"),
    ],
)
def test_what_a_support_cannot_be_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_support(*arguments)
