"""The order of the corpus: a partition, the same for ever."""

from hypothesis import given
from hypothesis import strategies as st

from sltrain.data.order import Slice, block_order, deal_slices, num_logical_streams, permuted, slice_order


@given(num_shards=st.integers(1, 40), num_streams=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_record_belongs_to_exactly_one_stream(num_shards, num_streams, seed):
    dealt = deal_slices(num_shards, num_streams, seed)
    records_per_shard = 60
    owners = [
        (part.shard, index)
        for slices in dealt
        for part in slices
        for index in range(records_per_shard)
        if index % part.step == part.offset
    ]
    assert sorted(owners) == [(shard, index) for shard in range(num_shards) for index in range(records_per_shard)]
    sizes = [len(slices) for slices in dealt]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= (1 if num_shards >= num_streams else 0)


@given(batch=st.integers(1, 700), wanted=st.integers(1, 16))
def test_the_number_of_streams_is_the_largest_divisor_up_to_the_wish(batch, wanted):
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
