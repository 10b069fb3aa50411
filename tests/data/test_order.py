"""The order of the corpus: a partition that never changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltrain.data.order import (
    DEALINGS,
    KEYED,
    Slice,
    block_order,
    deal_slices,
    num_logical_streams,
    permuted,
    slice_order,
)


def records_of(part, size, seed, dealing):
    """The records of a slice, of a shard of `size` records."""
    wanted = part.wanted(seed, dealing)
    return [index for index in range(size) if wanted is None or wanted(index)]


@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=30),
    num_streams=st.integers(1, 12),
    seed=st.integers(0, 5),
    dealing=st.sampled_from(DEALINGS),
)
def test_every_record_belongs_to_exactly_one_stream_and_all_have_as_much(sizes, num_streams, seed, dealing):
    dealt = deal_slices(sizes, num_streams, seed)
    owners = [
        [(part.shard, i) for part in slices for i in records_of(part, sizes[part.shard], seed, dealing)]
        for slices in dealt
    ]
    assert sorted(sum(owners, [])) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    loads = [len(records) for records in owners]
    assert max(loads) <= max(
        1.1 * min(loads), min(loads) + len(sizes)
    )  # each stream gets the same from a cut shard, up to one record


def test_even_shards_are_dealt_whole_and_uneven_ones_cut():
    assert all(part.count == 1 for slices in deal_slices([100] * 16, 8, 0) for part in slices)
    assert all(part.count == 8 for slices in deal_slices([100] * 15 + [500], 8, 0) for part in slices)
    assert all(part.count == 8 for slices in deal_slices([100] * 4, 8, 0) for part in slices)


@pytest.mark.parametrize("period", [2, 3, 8])
@pytest.mark.parametrize("num_streams", [2, 8, 12])
def test_records_in_a_regular_order_are_spread_over_all_streams(period, num_streams):
    """Of 2,400 records, record i is of kind i % period."""
    for member in range(num_streams):
        records = records_of(Slice(0, member, num_streams), 2400, 0, KEYED)
        assert [index // num_streams for index in records] == list(range(2400 // num_streams))  # one of every run
        fair = len(records) / period
        for kind in range(period):
            count = sum(index % period == kind for index in records)
            assert abs(count - fair) < 5 * (fair * (1 - 1 / period)) ** 0.5  # deviations of independent draws


def test_a_record_is_found_in_any_order():
    wanted = Slice(1, 2, 5).wanted(0, KEYED)
    forward = [wanted(index) for index in range(100)]
    assert [wanted(index) for index in reversed(range(100))] == forward[::-1]


@given(batch=st.integers(1, 700), wanted=st.integers(1, 16))
def test_the_number_of_streams_is_the_largest_divisor_up_to_the_request(batch, wanted):
    number = num_logical_streams(batch, wanted)
    assert batch % number == 0 and number <= wanted
    assert all(batch % larger for larger in range(number + 1, wanted + 1))


def test_orders_are_permutations_that_depend_on_each_key():
    part = Slice(3, 1, 2)
    indices = list(range(1, 201, 2))
    orders = [
        block_order(indices, 1, 0, part),
        block_order(indices, 2, 0, part),
        block_order(indices, 1, 1, part),
        block_order(indices, 1, 0, Slice(3, 1, 4)),
        block_order(list(range(3, 203, 2)), 1, 0, part),
    ]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    slices = [Slice(i, 0, 1) for i in range(20)]
    assert slice_order(slices, 1, 0, 0) != slice_order(slices, 1, 1, 0) != slices
    assert sorted(s.shard for s in slice_order(slices, 1, 0, 0)) == list(range(20))


def test_the_order_never_changes_between_releases():
    """Pinned: a checkpoint written by any version must find the same rows."""
    assert permuted(range(8), "pin", 42) == [3, 7, 5, 4, 1, 0, 6, 2]
    assert [part.shard for part in slice_order([Slice(i, i % 2, 2) for i in range(6)], 1, 0, 0)] == [4, 2, 5, 3, 0, 1]
    assert records_of(Slice(3, 1, 4), 24, 42, KEYED) == [1, 7, 10, 15, 17, 23]
