"""What the operations of a layer cost on this machine, in multiply-adds of its dense product.

A probe is a layer in which one operation does nearly all the work, forward and backward:

    seconds / (seconds of a dense multiply-add) = known multiply-adds + price * count

solved for the price. An entry of S is priced by a layer of S alone, with count = 3 N nnz; a pass over a dense W by a
composed layer at a few rows of x, whose products are known.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sltrain.benchmarks.layer import layer_task
from sltrain.benchmarks.table import Column, format_table, milliseconds, percent
from sltrain.benchmarks.timing import Say, in_turns, product_task

MEDIAN = "median"


@dataclass
class Probe:
    """One operation on one shape. `used` is the price that layer_path=auto reckons with, None where it does not use
    the operation."""

    price: str  # its name
    used: float | None
    module: nn.Module
    out_features: int
    in_features: int
    num_rows: int
    known: float  # multiply-adds besides
    count: float  # how often the price is paid

    @property
    def shape(self) -> str:
        return f"{self.out_features}x{self.in_features}"


def measure_prices(
    probes: list[Probe],
    num_rows: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int | None,
    deadline: float,
    say: Say,
) -> list[dict[str, Any]]:
    """A row for each probe, and the median over the shapes for each price. `num_rows` of x make the dense product."""
    tasks = {}
    for probe in probes:
        x = torch.randn(probe.num_rows, probe.in_features, device=device, dtype=dtype, requires_grad=True)
        grad_y = torch.randn(probe.num_rows, probe.out_features, device=device, dtype=dtype)
        tasks[f"{probe.price} {probe.shape}"] = layer_task(probe.module, x, grad_y)
        tasks[probe.shape] = product_task(num_rows, probe.out_features, probe.in_features, device, dtype)
    timings = in_turns(tasks, device, repeats=repeats, deadline=deadline, say=say)
    rows: list[dict[str, Any]] = []
    for probe in probes:
        unit = timings[probe.shape].median / (num_rows * probe.out_features * probe.in_features)
        timing = timings[f"{probe.price} {probe.shape}"]
        price = (timing.median / unit - probe.known) / probe.count
        rows.append(
            {
                "measured": probe.price,
                "shape": probe.shape,
                **timing.as_row(None),
                "price": price,
                "used": probe.used,
            }
        )
    return rows + _medians(rows)


def _medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    medians = []
    for name in dict.fromkeys(row["measured"] for row in rows):
        of_name = [row for row in rows if row["measured"] == name]
        price = statistics.median(row["price"] for row in of_name)
        common = {"seconds": None, "ratio_to_dense": None, "used": of_name[0]["used"]}
        medians.append({"measured": name, "shape": MEDIAN, "price": price, **common})
    return medians


COLUMNS = [
    Column("measured", "price of"),
    Column("shape", "out x in"),
    Column("seconds", "time", milliseconds),
    Column("spread", "+-", percent),
    Column("price", "measured", lambda price: f"{price:.1f}"),
    Column("used", "used", lambda price: f"{price:.1f}"),
]


def price_table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    return "in multiply-adds of the dense product\n\n" + format_table(rows, COLUMNS)
