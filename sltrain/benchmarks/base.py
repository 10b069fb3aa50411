"""What the benchmarks share: settings and device of a measurement, the machine, and Markdown tables."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sltrain import kernels
from sltrain.benchmarks.settings import BenchConfig
from sltrain.building.model import dtype_name, pick_dtype
from sltrain.compose import TRAIN, compose_config
from sltrain.config import TrainConfig
from sltrain.engine.distributed import pick_device

SEED = 42
SMALL_VOCAB = 4096  # of models that take their vocabulary from a tokenizer; experiment=quickstart uses the same
CPU_INFO = Path("/proc/cpuinfo")  # Linux

Row = dict[str, Any]
Result = tuple[list[Row], str]  # plain data, and the same as text


@dataclass(frozen=True)
class Bench:
    """One call of `sltrain-bench`."""

    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    deadline: float  # of time.monotonic; when the measurement should end

    @property
    def like(self) -> dict[str, Any]:
        """device= and dtype= of every tensor that is measured."""
        return {"device": self.device, "dtype": self.dtype}

    def train_config(self, *overrides: str) -> TrainConfig:
        """The configuration of `sltrain-train` for this model and row length with `overrides`. Raises ValueError."""
        chosen = [f"model={self.config.model or 'llama_60m'}", f"seq_len={self.config.seq_len}", "data=stdlib"]
        train: TrainConfig = compose_config([*chosen, *overrides], TRAIN)
        return train


def start_bench(config: BenchConfig) -> Bench:
    """Seed torch and start the clock. Raises ValueError if the machine lacks the device."""
    torch.manual_seed(SEED)
    device = pick_device(config.device)
    return Bench(config, device, pick_dtype(config.dtype, device), time.monotonic() + config.time_limit_s)


def vocab_size(train: TrainConfig) -> int:
    """The vocabulary of the measured model; no tokenizer is loaded."""
    return train.model.vocab_size or SMALL_VOCAB


def describe_machine(bench: Bench) -> Row:
    """Hardware and software that the numbers depend on."""
    gpu = torch.cuda.get_device_properties(bench.device) if bench.device.type == "cuda" else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu and gpu.name,
        "cuda": gpu and torch.version.cuda,
        "device": bench.device.type,
        "dtype": dtype_name(bench.dtype),
        "memory_bytes": gpu.total_memory if gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cpu_kernel": None if gpu else kernels.status() or "ready",
    }


def cpu_name() -> str:
    """The model of this machine's CPU."""
    found = re.search(r"^model name\s*: (.*)$", CPU_INFO.read_text(), re.MULTILINE) if CPU_INFO.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine_line(machine: Row) -> str:
    """`describe_machine` in one line."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cpu_threads']} threads"
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    return f"{where}, {machine['memory_bytes'] / 1e9:.0f} GB; {machine['dtype']}; torch {machine['torch']}{cuda}"


# ---- tables

Column = tuple[str, str, str]  # key of a row, heading, and a format specification or a key of UNITS
UNITS: dict[str, Callable[[float], str]] = {
    "time": lambda seconds: f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s",
    "giga": lambda number: f"{number / 1e9:,.1f}",
    "bytes": lambda number: f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB",
}


def write(value: Any, how: str) -> str:
    """A value as text; a dash for None."""
    return "-" if value is None else UNITS[how](value) if how in UNITS else format(value, how)


def format_table(rows: list[Row], columns: list[Column]) -> str:
    """A Markdown table, text aligned left and numbers right. Columns without a value are omitted."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[heading for _, heading, _ in columns]]
    cells += [[write(row.get(key), how) for key, _, how in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if how == "" else ">" for _, _, how in columns]
    rules = ["-" * (width - 1) + ("-" if side == "<" else ":") for width, side in zip(widths, sides, strict=True)]
    cells.insert(1, rules)
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
