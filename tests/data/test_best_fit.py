"""Best-fit-decreasing against a plain rewrite of the algorithm, and against what any such packing must hold."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.data.best_fit import best_fit_decreasing, packed_group


def plainly(lengths: list[int], capacity: int) -> list[list[int]]:
    """Looks at every row for every item."""
    rows: list[list[int]] = []
    for length, item in sorted(((length, item) for item, length in enumerate(lengths)), key=lambda pair: -pair[0]):
        used = [sum(lengths[other] for other in row) for row in rows]
        fitting = [number for number in range(len(rows)) if used[number] + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda number: (used[number], -number))].append(item)
        else:
            rows.append([item])
    return [sorted(row) for row in rows]


LENGTHS = st.integers(1, 24).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@settings(max_examples=200, deadline=None)
@given(LENGTHS)
def test_rows_are_those_of_the_plain_algorithm(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows = best_fit_decreasing(lengths, capacity)
    assert rows == plainly(lengths, capacity)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
    used = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < length <= capacity for length in used)
    assert all(a + b > capacity for a, b in itertools.combinations(used, 2)), "two rows would have been one"


def test_a_case_by_hand() -> None:
    """7 and 6 open rows of 10; 4 fits beside 6 only, 3 fills the first row, 2 and 2 share a third."""
    assert best_fit_decreasing([2, 7, 3, 2, 6, 4], 10) == [[1, 2], [4, 5], [0, 3]]


def test_the_order_of_rows_depends_on_the_key_alone() -> None:
    lengths = [7, 5, 3, 8, 8, 2, 1, 9, 4, 6, 6, 3]
    ours, again, other = (packed_group(lengths, 10, *key) for key in ((1, "a"), (1, "a"), (2, "a")))
    assert ours == again != other
    assert sorted(ours) == sorted(other) == sorted(best_fit_decreasing(lengths, 10))
