"""A support is sorted, distinct, of the promised size, uniform over all subsets, and cheap."""

import math
import time
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.layers import support
from sltrain.layers.support import _draw_distinct, draw_support, num_nonzero


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
    indices = draw_support(rows, columns, sparsity, generator(seed))
    assert indices.dtype == torch.int32
    assert len(indices) == int(sparsity * rows * columns)
    assert (indices[1:] > indices[:-1]).all()
    if len(indices):
        assert indices[0] >= 0 and indices[-1] < rows * columns
    assert torch.equal(indices, draw_support(rows, columns, sparsity, generator(seed)))


@pytest.mark.parametrize("limit", [7, 8])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7])
def test_every_subset_is_equally_likely(count, limit, monkeypatch):
    """Chi-square over all subsets of 8 positions, by the code for large matrices (limit 7) and for small ones (8)."""
    monkeypatch.setattr(support, "SHUFFLE_LIMIT", limit)
    source, num_draws = generator(count), 3000
    seen = dict.fromkeys(combinations(range(8), count), 0)
    for _ in range(num_draws):
        seen[tuple(_draw_distinct(8, count, source).tolist())] += 1
    assert_uniform(list(seen.values()), num_draws / math.comb(8, count))


@pytest.mark.parametrize("sparsity", [0.003, 0.05, 0.4, 0.6, 0.97])
def test_no_region_of_a_large_matrix_is_favoured(sparsity):
    """Cutting sorted positions off would empty the last rows: blocks of positions and of columns are counted."""
    rows, columns, num_draws = 256, 128, 40
    source = generator(1)
    drawn = torch.cat([draw_support(rows, columns, sparsity, source) for _ in range(num_draws)])
    expected = num_draws * num_nonzero(rows, columns, sparsity) / 64
    assert_uniform(torch.bincount(drawn // (rows * columns // 64), minlength=64).tolist(), expected)
    assert_uniform(torch.bincount(drawn % columns // 2, minlength=64).tolist(), expected)


def assert_uniform(counts, expected):
    """Pearson's statistic within 4.5 standard deviations of its mean (draws without replacement make it smaller)."""
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    freedom = len(counts) - 1
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_a_7b_projection_is_drawn_quickly():
    start = time.perf_counter()
    indices = draw_support(4096, 11008, 0.05, generator())
    assert time.perf_counter() - start < 5  # 0.2 s on an idle core; shuffling every position takes 1 s and 360 MB
    assert len(indices) == int(0.05 * 4096 * 11008)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 3, math.nan])
def test_a_sparsity_outside_the_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity .* must be in \[0, 1\)"):
        draw_support(4, 4, sparsity)


def test_a_matrix_beyond_int32_is_refused():
    with pytest.raises(ValueError, match="more than 2147483647 entries"):
        num_nonzero(2**16, 2**15, 0.01)
    assert num_nonzero(2**16, 2**15 - 1, 0.0) == 0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind of support 'banded'; known: uniform"):
        draw_support(4, 4, 0.5, kind="banded")
