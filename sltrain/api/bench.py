"""Measure how fast a layer, an update or the training stream is on this machine."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sltrain.benchmarks.base import Result, describe_machine, start_bench
from sltrain.benchmarks.data import measure_data
from sltrain.benchmarks.layer import measure_layer
from sltrain.benchmarks.prices import measure_prices
from sltrain.benchmarks.settings import BenchConfig
from sltrain.benchmarks.step import measure_step

MEASURES = {"layer": measure_layer, "step": measure_step, "data": measure_data}


def measure(config: BenchConfig, say: Callable[[str], None] = lambda line: None) -> tuple[dict[str, Any], Result]:
    """What the numbers depend on (`what`, `machine`, `settings`), and what was found; `say` gets lines of progress.
    Raises ValueError or OSError for what cannot be measured."""
    bench = start_bench(config, say)
    result = measure_prices(bench) if config.calibrate else MEASURES[config.what](bench)
    return {"what": config.what, "machine": describe_machine(bench), "settings": asdict(config)}, result
