"""A price is the time of a probe less that of its known work, per operation."""

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.benchmark import Measurement, TaskSpec

from sltrain.benchmarks import prices
from sltrain.benchmarks.base import Bench
from sltrain.benchmarks.prices import make_probes, measure_prices

ARGUMENTS = ["what=layer", "device=cpu", "tokens=10", "sparsity=0.25", "block_size=2", "shapes=[[16,24,4]]"]


def test_known_work_is_subtracted_from_the_time(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiply-add takes 0.5 s, and every operation 7 of them."""
    count, known = 3 * 10 * 16 * 24 // 4, (3 * 16 + 4 * 4) * 16 * 24
    seconds = dict.fromkeys(("entry", "block_entry", "column_entry"), 0.5 * 7 * count)
    seconds |= {"weight_pass": 0.5 * (known + 7 * 8 * 16 * 24), "product": 0.5}

    def timings(*arguments: Any) -> dict[tuple[str, str], Measurement]:
        return {("16x24 r4", name): Measurement(1, [s, s], TaskSpec(name, "")) for name, s in seconds.items()}

    monkeypatch.setattr(prices, "time_beside_products", timings)
    rows, _ = measure_prices(bench(*ARGUMENTS))
    assert len(rows) == 8 and {row["shape"] for row in rows} == {"16x24 r4", "median"}
    assert [row["price"] for row in rows] == [pytest.approx(7)] * 8


def test_probes_count_what_they_do(bench: Callable[..., Bench]) -> None:
    probes = make_probes(bench(*ARGUMENTS), [16, 24, 4])
    for price in ("entry", "block_entry", "column_entry"):
        assert probes[price][1:] == (0, 3 * 10 * 16 * 24 // 4)
    _, known, _ = probes["weight_pass"]
    assert known == 3 * 16 * 16 * 24 + 4 * 4 * 16 * 24, "products at 16 rows of x, and B A built twice with dW"
    for task, _, _ in probes.values():
        task.before(), task.run()
