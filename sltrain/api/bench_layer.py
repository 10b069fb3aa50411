"""`sltrain-bench what=layer`: one projection in every way, and the prices that `layer_path=auto` reckons with."""

from typing import Any

from torch import nn

from sltrain.api.bench import Bench, Result, leave_zero
from sltrain.api.bench_config import CANDIDATES
from sltrain.benchmarks.calibrate import Probe, measure_prices, price_table
from sltrain.benchmarks.layer import Case, layer_tables, measure_layers
from sltrain.benchmarks.published import PublishedLinear
from sltrain.layers import LowRankLinear, ReplacedLinear, SLTrainLinear
from sltrain.layers.cost import COSTS, PASSES, machine_kind

LAYER_SPARSITY = 0.03  # the paper's, from 60M to 1B
LAYER_ALPHA = 16  # has no influence on time
FEW_ROWS = 16  # of x, where a layer's work is to make W dense


def run_layer(bench: Bench) -> Result:
    """Every candidate on every shape."""
    config = bench.config
    if config.calibrate:
        return run_calibration(bench)
    names = config.candidates or list(CANDIDATES["layer"])
    cases = [layer_case(bench, names, *shape) for shape in config.shapes]
    rows = measure_layers(
        cases,
        config.tokens,
        device=bench.device,
        dtype=bench.dtype,
        repeats=config.repeats,
        deadline=bench.deadline,
        say=bench.say,
    )
    return Result(rows, layer_tables(rows))


def layer_case(bench: Bench, names: list[str], out_features: int, in_features: int, rank: int) -> Case:
    """The candidates of one shape. Raises ValueError for a sparsity or block size that it cannot have."""
    config = bench.config
    sparsity = config.sparsity or LAYER_SPARSITY
    like: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    made: dict[tuple[str, str], nn.Module] = {}

    def sltrain(support: str, path: str | None) -> nn.Module:
        layer = sltrain_layer(bench, out_features, in_features, rank, support)
        layer.path = path or layer.choose_path(config.tokens, bench.device)
        return made.setdefault((support, layer.path), layer)

    def make(name: str) -> nn.Module:
        if name == "dense":
            return nn.Linear(in_features, out_features, bias=False, **like)
        if name == "low_rank":
            return LowRankLinear(in_features, out_features, rank, LAYER_ALPHA, **like)
        if name == "published":
            return PublishedLinear(in_features, out_features, rank, sparsity, LAYER_ALPHA, **like)
        support, _, path = name.partition("_")
        return sltrain(support, path or None)

    try:
        modules = {name: make(name) for name in names}
    except ValueError as error:
        raise ValueError(f"{out_features}x{in_features}: {error}") from error
    for module in modules.values():
        leave_zero(module)
    paths = {
        name: module.path for name, module in modules.items() if isinstance(module, ReplacedLinear) and module.PATHS
    }
    num_nonzero = int(sparsity * out_features * in_features)
    return Case(out_features, in_features, rank, num_nonzero, modules, paths)


def sltrain_layer(bench: Bench, out_features: int, in_features: int, rank: int, support: str) -> SLTrainLinear:
    """With the sparsity and block size that were typed. Raises ValueError for one that the shape cannot have."""
    return SLTrainLinear(
        in_features,
        out_features,
        rank,
        bench.config.sparsity or LAYER_SPARSITY,
        LAYER_ALPHA,
        support=support,
        block_size=bench.config.block_size if support == "block" else None,
        device=bench.device,
        dtype=bench.dtype,
    )


def run_calibration(bench: Bench) -> Result:
    """The prices of cost.py on every shape, measured beside used. Raises ValueError as `layer_case` does."""
    config = bench.config
    rows = measure_prices(
        [probe for shape in config.shapes for probe in probes(bench, *shape)],
        config.tokens,
        device=bench.device,
        dtype=bench.dtype,
        repeats=config.repeats,
        deadline=bench.deadline,
        say=bench.say,
    )
    return Result(rows, price_table(rows))


def probes(bench: Bench, out_features: int, in_features: int, rank: int) -> list[Probe]:
    """A layer for each price: S alone, and W made dense for few rows of x."""
    config = bench.config
    costs = COSTS[machine_kind(bench.device, bench.dtype)]

    def layer(rank: int, support: str, path: str) -> SLTrainLinear:
        made = sltrain_layer(bench, out_features, in_features, rank, support)
        made.path = path
        leave_zero(made)
        return made

    shape = {"out_features": out_features, "in_features": in_features}
    found = []
    for price, support in (("entry", "uniform"), ("block_entry", "block"), ("column_entry", "column")):
        module, rows = layer(0, support, "factored"), config.tokens
        count = 3 * rows * module.support.num_nonzero
        found.append(Probe(price, getattr(costs, price), module, **shape, num_rows=rows, known=0, count=count))
    entries = out_features * in_features
    known, count = (3 * FEW_ROWS + 4 * rank) * entries, PASSES * entries
    composed = layer(rank, "uniform", "composed")
    found.append(
        Probe("weight_pass", costs.weight_pass, composed, **shape, num_rows=FEW_ROWS, known=known, count=count)
    )
    return found
