"""A price is what is left of the time of a probe, by the count of its operation."""

from collections.abc import Callable

import pytest

from sltrain.benchmarks.base import Bench
from sltrain.benchmarks.prices import Probe, make_probes
from sltrain.benchmarks.timing import Task


def test_what_is_known_comes_off_before_the_price() -> None:
    probe = Probe("entry", [8, 8, 2], Task(lambda: None), known=100, count=40)
    assert probe.solve(seconds=0.5 * (100 + 40 * 7), unit=0.5) == pytest.approx(7)


def test_probes_count_what_they_do(bench: Callable[..., Bench]) -> None:
    probes = make_probes(bench("what=layer", "device=cpu", "tokens=10", "sparsity=0.25", "block_size=2"), [16, 24, 4])
    by_price = {probe.price: probe for probe in probes}
    for price in ("entry", "block_entry", "column_entry"):
        assert (by_price[price].known, by_price[price].count) == (0, 3 * 10 * 16 * 24 // 4)
    built = by_price["weight_pass"]
    assert built.known == 3 * 16 * 16 * 24 + 4 * 4 * 16 * 24, "products at 16 rows of x, and B A built twice with dW"
    for probe in probes:
        probe.task.before(), probe.task.run()
