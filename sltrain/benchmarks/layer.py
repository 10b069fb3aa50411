"""One projection, forward and backward, in every way to compute it.

    N rows of x, in and out features, rank r, nnz trained entries of S; multiply-adds, forward and both gradients:

    floor_dense      3 N in out                      what nn.Linear has to do
    floor_factored   3 N r (in + out) + 3 N nnz      what W = scale*BA + S has to do
    floor_composed   3 N in out + 4 r in out         what it has to do if W is made dense on the way

each over the rate of the machine's dense product of that shape (row `product`), timed in the same rounds. Beside the
times: the bytes of parameters and indices, and what a layer keeps from forward to backward besides those and x.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.benchmarks.table import Column, format_table, milliseconds, percent, size, two_digits
from sltrain.benchmarks.timing import Say, Task, Timing, geometric_mean, in_turns, product_task

MEAN = "geometric mean"
FLOORS = ("floor_dense", "floor_factored", "floor_composed")


TOTAL_COLUMNS = [
    Column("measured", "measured"),
    Column("path", "path"),
    Column("seconds", "time", milliseconds),
    Column("spread", "+-", percent),
    Column("ratio_to_dense", "over dense", two_digits),
    Column("fastest_ratio_to_dense", "fastest over fastest", two_digits),
    Column("parameter_bytes", "parameters and indices", size),
    Column("saved_bytes", "kept for backward", size),
]


@dataclass
class Case:
    """One shape and the modules (..., in) -> (..., out) that are compared on it. A module that goes by two names is
    timed once. `paths` says how a candidate computes W x, where there is a choice."""

    out_features: int
    in_features: int
    rank: int
    num_nonzero: int
    candidates: dict[str, nn.Module]
    paths: dict[str, str]

    @property
    def label(self) -> str:
        return f"{self.out_features}x{self.in_features} r{self.rank}"

    def floors(self, num_rows: int) -> dict[str, int]:
        """Multiply-adds of each floor."""
        dense = 3 * num_rows * self.in_features * self.out_features
        factored = 3 * num_rows * (self.rank * (self.in_features + self.out_features) + self.num_nonzero)
        composed = dense + 4 * self.rank * self.in_features * self.out_features
        return {"floor_dense": dense, "floor_factored": factored, "floor_composed": composed}


def measure_layers(
    cases: list[Case],
    num_rows: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int | None,
    deadline: float,
    say: Say,
) -> list[dict[str, Any]]:
    """Rows for every shape and candidate, the floors, and geometric means over the shapes."""
    tasks: dict[str, Task] = {}
    saved: dict[nn.Module, int] = {}
    for case in cases:
        x = torch.randn(num_rows, case.in_features, device=device, dtype=dtype, requires_grad=True)
        grad_y = torch.randn(num_rows, case.out_features, device=device, dtype=dtype)
        for module in dict.fromkeys(case.candidates.values()):
            tasks[_key(case, module)] = layer_task(module, x, grad_y)
            saved[module] = saved_bytes(module, x)
        tasks[_key(case, None)] = product_task(num_rows, case.out_features, case.in_features, device, dtype)
    timings = in_turns(tasks, device, repeats=repeats, deadline=deadline, say=say)
    rows = [row for case in cases for row in _rows_of_case(case, num_rows, timings, saved)]
    return rows + _mean_rows(rows)


def layer_task(module: nn.Module, x: Tensor, grad_y: Tensor) -> Task:
    """Forward and backward of a module at x, down to the gradients of x and of every parameter."""

    def clear() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)

    return Task(lambda: module(x).backward(grad_y), before=clear, after=clear)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that forward keeps for backward, besides x, parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)
    del y  # until here nothing that was kept could be freed, and its address given to another
    return sum(kept.values())


def _key(case: Case, module: nn.Module | None) -> str:
    return f"{case.label} {id(module)}"


def _rows_of_case(
    case: Case, num_rows: int, timings: dict[str, Timing], saved: dict[nn.Module, int]
) -> list[dict[str, Any]]:
    dense_module = case.candidates.get("dense")
    dense = None if dense_module is None else timings[_key(case, dense_module)]
    rows: list[dict[str, Any]] = []
    for name, module in case.candidates.items():
        tensors = [*module.parameters(), *module.buffers()]
        rows.append(
            {
                "measured": name,
                "shape": case.label,
                "path": case.paths.get(name),
                **timings[_key(case, module)].as_row(dense),
                "parameter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                "saved_bytes": saved[module],
            }
        )
    product = timings[_key(case, None)]
    rate = num_rows * case.in_features * case.out_features / product.median  # multiply-adds a second
    for name, work in case.floors(num_rows).items():
        over_dense = None if dense is None else work / rate / dense.median
        row = {"measured": name, "shape": case.label, "seconds": work / rate, "ratio_to_dense": over_dense}
        rows.append(row)
    rows.append(
        {"measured": "product", "shape": case.label, **product.as_row(None), "flops_per_second": 2 * rate},
    )
    return rows


def _mean_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the shapes of everything but the product, whose time alone says nothing."""
    means = []
    for name in dict.fromkeys(row["measured"] for row in rows if row["measured"] != "product"):
        of_name = [row for row in rows if row["measured"] == name]
        keys = ("seconds", "ratio_to_dense", "fastest_ratio_to_dense")
        mean = {key: geometric_mean([row.get(key) for row in of_name]) for key in keys}
        means.append({"measured": name, "shape": MEAN, **mean})
    return means


def layer_tables(rows: list[dict[str, Any]]) -> str:
    """Two tables: time over dense by shape, and every candidate over all shapes."""
    names = list(dict.fromkeys(row["measured"] for row in rows))
    by_shape: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = by_shape.setdefault(row["shape"], {"shape": row["shape"]})
        line[row["measured"]] = row["seconds"] if row["measured"] in ("dense", "product") else row["ratio_to_dense"]
        if row["measured"] == "product" and "flops_per_second" in row:
            line["product"] = row["flops_per_second"] / 1e9
    columns = [Column("shape", "out x in, rank"), Column("dense", "dense", milliseconds)]
    columns += [Column(name, name, two_digits) for name in names if name not in ("dense", "product")]
    columns.append(Column("product", "GFLOP/s", lambda rate: f"{rate:,.0f}"))

    totals = []
    for mean in (row for row in rows if row["shape"] == MEAN and row["measured"] not in FLOORS):
        of_name = [row for row in rows if row["measured"] == mean["measured"] and row["shape"] != MEAN]
        totals.append(
            {
                **mean,
                "path": " ".join(sorted({row["path"] for row in of_name if row["path"]})) or None,
                "spread": max(row["spread"] for row in of_name),
                "parameter_bytes": sum(row["parameter_bytes"] for row in of_name),
                "saved_bytes": sum(row["saved_bytes"] for row in of_name),
            }
        )
    return (
        "time over dense\n\n"
        + format_table(list(by_shape.values()), columns)
        + ("\n\nall shapes: geometric means, widest spread, sums of bytes\n\n" + format_table(totals, TOTAL_COLUMNS))
    )
