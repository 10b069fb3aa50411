"""One projection, forward and backward, for each layer kind.

    floor    3 N m multiply-adds over the rate of the machine's dense product of that shape: forward and both
             gradients for N rows of x, m multiply-adds of x W^T for one row by the layer's mathematics

The dense product is timed in the same rounds as the candidates.
"""

import inspect
import statistics
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Measurement

from sltrain.benchmarks.base import Bench, Column, Result, Row, format_table
from sltrain.benchmarks.published import PublishedLinear
from sltrain.benchmarks.settings import LAYER_CANDIDATES, USUAL
from sltrain.benchmarks.timing import Task, compare, fill_zeros, in_turns, product_task
from sltrain.engine.memory import bytes_of
from sltrain.layers.base import LAYERS, ReplacedLinear
from sltrain.layers.started import StartedLinear
from sltrain.planning.flops import linear_multiply_adds

SPARSITY = 0.03  # the paper's, from 60M to 1B
ALPHA = 16  # does not affect time
MEAN, PRODUCT, DENSE = "geometric mean", "product", "dense"
REFERENCES: dict[str, type[nn.Module]] = {"nn.Linear": nn.Linear, "published": PublishedLinear}


def measure_layer(bench: Bench) -> Result:
    """A row for each candidate and shape, and geometric means over the shapes. Raises ValueError for an unknown
    candidate, or one that a shape does not allow."""
    config = bench.config
    names = config.candidates or USUAL["layer"]
    layers = {(label(shape), name): make_layer(bench, name, shape) for shape in config.shapes for name in names}
    shapes = {label(shape): shape for shape in config.shapes}
    tasks = {key: layer_task(bench, layer, shapes[key[0]], config.tokens) for key, layer in layers.items()}
    timings = time_beside_products(bench, tasks)
    rows: list[Row] = []
    for (where, name), layer in layers.items():
        dense = timings.get((where, DENSE))
        unit = timings[where, PRODUCT].median  # seconds of a multiply-add
        floor = 3 * config.tokens * linear_multiply_adds(layer) * unit
        rows.append(
            {
                "measured": name,
                "shape": where,
                "path": layer.path if isinstance(layer, ReplacedLinear) and layer.PATHS else None,
                **compare(timings[where, name], dense),
                "floor_seconds": floor,
                "floor_ratio_to_dense": floor / dense.median if dense else None,
                "parameter_bytes": bytes_of([*layer.parameters(), *layer.buffers()]),
                "product_flops_per_second": 2 / unit,
            }
        )
    rows += [mean_row([row for row in rows if row["measured"] == name]) for name in names]
    return rows, layer_table(rows)


def label(shape: list[int]) -> str:
    """512x512 r128."""
    return f"{shape[0]}x{shape[1]} r{shape[2]}"


def make_layer(bench: Bench, name: str, shape: list[int]) -> nn.Module:
    """The layer of a candidate: a name of LAYER_CANDIDATES, a registered layer kind, or either as NAME_PATH. Raises
    ValueError."""
    known: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in LAYERS.names()} | LAYER_CANDIDATES
    base, named_path, path = (name, "", "") if name in known else name.rpartition("_")
    if base not in known:
        raise ValueError(f"candidates: {name} is unknown to what=layer; choose from {', '.join(known)}, NAME_PATH")
    kind, settings = known[base]
    if kind not in REFERENCES and LAYERS.load(kind).takes_previous:
        raise ValueError(f"candidates: {name} reads what the decoder layer before gives; time it by what=step")
    if settings.get("support") == "block":
        settings = {**settings, "block_size": bench.config.block_size}
    layer = build_layer(bench, kind, shape, settings)
    paths = layer.PATHS if isinstance(layer, ReplacedLinear) else ()
    if named_path and path not in paths:
        raise ValueError(f"candidates: {name}: the paths of {base} are: {', '.join(paths) or 'none'}")
    if named_path and isinstance(layer, ReplacedLinear):
        layer.path = path
    return layer


def build_layer(bench: Bench, kind: str, shape: list[int], settings: dict[str, Any]) -> nn.Module:
    """A layer of this kind, its zeros filled. Of bias, rank, sparsity, alpha and `settings` it gets what its
    constructor takes. Raises ValueError for settings that it refuses."""
    out_features, in_features, rank = shape
    cls = REFERENCES.get(kind) or LAYERS.load(kind)
    sparsity = bench.config.sparsity or SPARSITY
    offered = {"bias": False, "rank": rank, "sparsity": sparsity, "alpha": ALPHA, **settings}
    taking = (cls, cls.prepare) if issubclass(cls, StartedLinear) else (cls,)
    names = {name for each in taking for name in inspect.signature(each).parameters}
    taken = {key: value for key, value in offered.items() if key in names}
    try:
        layer: nn.Module = cls(in_features, out_features, **bench.like, **taken)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind}, {out_features}x{in_features}: {error}") from error
    fill_zeros(layer)
    return layer


def time_beside_products(bench: Bench, tasks: dict[tuple[str, str], Task]) -> dict[tuple[str, str], Measurement]:
    """Timings of tasks by (label of the shape, name), and of the dense product of each shape under the name PRODUCT."""
    config = bench.config
    products = {(label(s), PRODUCT): product_task(config.tokens, s[:2], **bench.like) for s in config.shapes}
    return in_turns(tasks | products, repeats=config.repeats, deadline=bench.deadline)


def layer_task(bench: Bench, layer: nn.Module, shape: list[int], num_rows: int) -> Task:
    """Forward and backward for `num_rows` rows of x, with the gradients of x and of every parameter."""
    x = torch.randn(num_rows, shape[1], **bench.like, requires_grad=True)
    grad_y = torch.randn(num_rows, shape[0], **bench.like)

    def clear() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return Task(lambda: layer(x).backward(grad_y), before=clear, after=clear)


def mean_row(rows: list[Row]) -> Row:
    """One candidate over all shapes: geometric means of times and ratios, the widest spread, the sum of bytes."""
    keys = ("seconds", "ratio_to_dense", "fastest_ratio_to_dense", "floor_seconds", "floor_ratio_to_dense")
    values = {key: [row[key] for row in rows] for key in keys}
    return {
        "measured": rows[0]["measured"],
        "shape": MEAN,
        "path": " ".join(sorted({row["path"] for row in rows if row["path"]})) or None,
        "spread": max(row["spread"] for row in rows),
        "parameter_bytes": sum(row["parameter_bytes"] for row in rows),
        **{key: None if None in values[key] else statistics.geometric_mean(values[key]) for key in keys},
    }


def layer_table(rows: list[Row]) -> str:
    """A line for each shape and their mean, a column for each candidate: its time over that of dense. The floor is that
    of `uniform`, or of the last candidate."""
    names = list(dict.fromkeys(row["measured"] for row in rows))
    floor_of = "uniform" if "uniform" in names else names[-1]
    key_of = {DENSE: "seconds"} if DENSE in names else dict.fromkeys(names, "seconds")  # without dense, plain times
    by_shape: dict[str, Row] = {}
    for row in rows:
        line = by_shape.setdefault(row["shape"], {"shape": row["shape"], PRODUCT: row.get("product_flops_per_second")})
        line[row["measured"]] = row[key_of.get(row["measured"], "ratio_to_dense")]
        if row["measured"] == floor_of:
            line["floor"] = row["floor_ratio_to_dense"]
    columns: list[Column] = [("shape", "out x in, rank", "")]
    columns += [(name, name, "time" if name in key_of else ".2f") for name in names]
    columns += [("floor", f"floor of {floor_of}", ".2f"), (PRODUCT, "GFLOP/s", "giga")]
    return f"{'time over dense' if DENSE in names else 'time'}\n\n{format_table(list(by_shape.values()), columns)}"
