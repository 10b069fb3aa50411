"""The prices of layers/cost.py, measured on this machine in multiply-adds of its dense product.

A probe is a layer in which one operation does nearly all the work, forward and backward:

    seconds / (seconds of a dense multiply-add) = known multiply-adds + price * count

A layer of S alone gives the price of an entry of S, with count = 3 N nnz; a composed layer at few rows of x, the price
of a pass over a dense W, with the products as known multiply-adds.
"""

import statistics

from sltrain.benchmarks.base import Bench, Column, Result, Row, format_table
from sltrain.benchmarks.layer import PRODUCT, build_layer, label, layer_task, time_beside_products
from sltrain.benchmarks.timing import Task, compare
from sltrain.layers.cost import COSTS, PASSES, machine_kind
from sltrain.planning.flops import linear_multiply_adds

FEW_ROWS = 16  # of x; building W takes most of the time of a composed layer then
ENTRIES = {"entry": "uniform", "block_entry": "block", "column_entry": "column"}  # price of an entry -> support
COLUMNS: list[Column] = [
    ("measured", "price of", ""),
    ("shape", "out x in", ""),
    ("seconds", "time", "time"),
    ("spread", "+-", ".0%"),
    ("price", "measured", ".1f"),
    ("used", "used", ".1f"),
]


def measure_prices(bench: Bench) -> Result:
    """A row for each price and shape, and medians over the shapes. `used` is the price of layer_path=auto."""
    probes = {
        (label(shape), price): probe
        for shape in bench.config.shapes
        for price, probe in make_probes(bench, shape).items()
    }
    timings = time_beside_products(bench, {key: task for key, (task, _, _) in probes.items()})
    rows: list[Row] = []
    for (where, name), (_, known, count) in probes.items():
        timing, unit = timings[where, name], timings[where, PRODUCT].median
        price = (timing.median / unit - known) / count
        rows.append({"measured": name, "shape": where, **compare(timing, None), "price": price})
    for name in dict.fromkeys(name for _, name in probes):
        price = statistics.median(row["price"] for row in rows if row["measured"] == name)
        rows.append({"measured": name, "shape": "median", "price": price})
    costs = COSTS[machine_kind(bench.device, bench.dtype)]
    rows = [{**row, "used": getattr(costs, row["measured"])} for row in rows]
    return rows, f"in multiply-adds of the dense product\n\n{format_table(rows, COLUMNS)}"


def make_probes(bench: Bench, shape: list[int]) -> dict[str, tuple[Task, float, float]]:
    """By price, a field of layers.cost.Costs: the probe, its known multiply-adds, and the count. Raises ValueError for
    a sparsity or block size that the shape does not allow."""
    out_features, in_features, rank = shape
    probes: dict[str, tuple[Task, float, float]] = {}
    for price, support in ENTRIES.items():
        size = {"block_size": bench.config.block_size} if support == "block" else {}
        layer = build_layer(bench, "sltrain", shape, {"rank": 0, "support": support, "path": "factored", **size})
        task = layer_task(bench, layer, shape, bench.config.tokens)
        probes[price] = task, 0, 3 * bench.config.tokens * linear_multiply_adds(layer)
    layer = build_layer(bench, "sltrain", shape, {"support": "uniform", "path": "composed"})
    entries = out_features * in_features
    task = layer_task(bench, layer, shape, FEW_ROWS)
    return {**probes, "weight_pass": (task, (3 * FEW_ROWS + 4 * rank) * entries, PASSES * entries)}
