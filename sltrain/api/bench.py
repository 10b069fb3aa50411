"""Measure how fast a layer, an update or the training stream is on this machine."""

from dataclasses import asdict
from typing import Any

from sltrain.benchmarks.base import describe_machine, machine_line, start_bench
from sltrain.benchmarks.data import measure_data
from sltrain.benchmarks.layer import measure_layer
from sltrain.benchmarks.prices import measure_prices
from sltrain.benchmarks.settings import BenchConfig
from sltrain.benchmarks.step import measure_step

MEASURES = {"layer": measure_layer, "step": measure_step, "data": measure_data}


def measure(config: BenchConfig) -> tuple[dict[str, Any], str]:
    """What was found, as plain data (`rows`, and what they depend on: `what`, `machine`, `settings`) and as text for
    people. Raises ValueError or OSError for what cannot be measured."""
    bench = start_bench(config)
    rows, tables = (measure_prices if config.calibrate else MEASURES[config.what])(bench)
    machine = describe_machine(bench)
    data = {"what": config.what, "machine": machine, "settings": asdict(config), "rows": rows}
    return data, f"{machine_line(machine)}\n\n{tables}"
