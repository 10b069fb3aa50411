"""What the operations of SLTrainLinear cost on this machine: the prices of layers/cost.py, in multiply-adds of the
dense product. A probe is a layer in which one operation does nearly all the work, forward and backward:

    seconds / (seconds of a dense multiply-add) = known multiply-adds + price * count

An entry of S is priced by a layer of S alone, with count = 3 N nnz; a pass over a dense W by a composed layer at a few
rows of x, whose products are known.
"""

import statistics
from dataclasses import dataclass
from typing import Any

from sltrain.benchmarks.base import Bench, Column, Result, Row, format_table
from sltrain.benchmarks.layer import PRODUCT, build_layer, label, layer_task, multiply_adds
from sltrain.benchmarks.timing import Task, compare, in_turns, product_task
from sltrain.layers.cost import COSTS, PASSES, machine_kind

FEW_ROWS = 16  # of x, where the work of a composed layer is to build W
ENTRIES = {"entry": "uniform", "block_entry": "block", "column_entry": "column"}  # price of an entry -> support
COLUMNS: list[Column] = [
    ("measured", "price of", ""),
    ("shape", "out x in", ""),
    ("seconds", "time", "time"),
    ("spread", "+-", ".0%"),
    ("price", "measured", ".1f"),
    ("used", "used", ".1f"),
]


@dataclass(frozen=True)
class Probe:
    """One operation on one shape."""

    price: str  # its name in layers/cost.py
    shape: list[int]
    task: Task
    known: float  # multiply-adds besides
    count: float  # how often the price is paid

    def solve(self, seconds: float, unit: float) -> float:
        """The price, if the probe takes so long and a dense multiply-add `unit` seconds."""
        return (seconds / unit - self.known) / self.count


def measure_prices(bench: Bench) -> Result:
    """A row for each price and shape, and medians over the shapes. `used` is the price that layer_path=auto uses."""
    probes = [probe for shape in bench.config.shapes for probe in make_probes(bench, shape)]
    tasks: dict[Any, Task] = {(label(probe.shape), probe.price): probe.task for probe in probes}
    for shape in bench.config.shapes:
        tasks[label(shape), PRODUCT] = product_task(bench.config.tokens, shape[:2], **bench.like)
    timings = in_turns(tasks, repeats=bench.config.repeats, deadline=bench.deadline)
    costs = COSTS[machine_kind(bench.device, bench.dtype)]
    rows: list[Row] = []
    for probe in probes:
        where = label(probe.shape)
        timing, unit = timings[where, probe.price], timings[where, PRODUCT].median
        price = probe.solve(timing.median, unit)
        rows.append({"measured": probe.price, "shape": where, **compare(timing, None), "price": price})
    for name in [*ENTRIES, "weight_pass"]:
        price = statistics.median(row["price"] for row in rows if row["measured"] == name)
        rows.append({"measured": name, "shape": "median", "price": price})
    rows = [{**row, "used": getattr(costs, row["measured"])} for row in rows]
    return rows, f"in multiply-adds of the dense product\n\n{format_table(rows, COLUMNS)}"


def make_probes(bench: Bench, shape: list[int]) -> list[Probe]:
    """S alone in every support that has a price, and W built for a few rows of x. Raises ValueError for a sparsity or
    block size that the shape cannot have."""
    out_features, in_features, rank = shape
    probes = []
    for price, support in ENTRIES.items():
        size = {"block_size": bench.config.block_size} if support == "block" else {}
        layer = build_layer(bench, "sltrain", shape, {"rank": 0, "support": support, "path": "factored", **size})
        count = 3 * bench.config.tokens * multiply_adds(layer)
        probes.append(Probe(price, shape, layer_task(bench, layer, shape, bench.config.tokens), 0, count))
    layer = build_layer(bench, "sltrain", shape, {"support": "uniform", "path": "composed"})
    entries = out_features * in_features
    task = layer_task(bench, layer, shape, FEW_ROWS)
    return [*probes, Probe("weight_pass", shape, task, (3 * FEW_ROWS + 4 * rank) * entries, PASSES * entries)]
