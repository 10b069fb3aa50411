"""What the benchmarks share: settings with the machine they run on, and how a table is printed."""

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
SMALL_VOCAB = 4096  # for models without a vocabulary of their own: what experiment=quickstart gives them
CPU_INFO = Path("/proc/cpuinfo")  # Linux

Row = dict[str, Any]
Result = tuple[list[Row], str]  # what a benchmark found: plain data, and the same as text


@dataclass(frozen=True)
class Bench:
    """A benchmark's settings, its device, and the time by which it should be done."""

    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    deadline: float  # of time.monotonic

    @property
    def like(self) -> dict[str, Any]:
        """Where tensors are made, and of which type."""
        return {"device": self.device, "dtype": self.dtype}

    def train_config(self, *overrides: str) -> TrainConfig:
        """The run of `sltrain-train` with these overrides on top of the model and the row length. Raises ValueError."""
        chosen = [f"model={self.config.model or 'llama_60m'}", f"seq_len={self.config.seq_len}", "data=stdlib"]
        train: TrainConfig = compose_config([*chosen, *overrides], TRAIN)
        return train


def start_bench(config: BenchConfig) -> Bench:
    """Seed torch and start the clock. Raises ValueError for a device that is not there."""
    torch.manual_seed(SEED)
    device = pick_device(config.device)
    return Bench(config, device, pick_dtype(config.dtype, device), time.monotonic() + config.time_limit_s)


def vocab_size(train: TrainConfig) -> int:
    """Of the model that is measured; no tokenizer is loaded for it."""
    return train.model.vocab_size or SMALL_VOCAB


def describe_machine(bench: Bench) -> Row:
    """What the numbers depend on besides the code."""
    is_cuda = bench.device.type == "cuda"
    gpu = torch.cuda.get_device_properties(bench.device) if is_cuda else None
    cpu = re.search(r"^model name\s*: (.*)$", CPU_INFO.read_text(), re.MULTILINE) if CPU_INFO.exists() else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu and gpu.name,
        "cuda": torch.version.cuda if is_cuda else None,
        "device": bench.device.type,
        "dtype": dtype_name(bench.dtype),
        "memory_bytes": gpu.total_memory if gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cpu_kernel": None if is_cuda else kernels.status() or "ready",
    }


def machine_line(machine: Row) -> str:
    """The same in one line."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cpu_threads']} threads"
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    return f"{where}, {machine['memory_bytes'] / 1e9:.0f} GB; {machine['dtype']}; torch {machine['torch']}{cuda}"


# ---- tables

Column = tuple[str, str, str]  # key of the rows, title, and how a value is written: a format, or one of UNITS
UNITS: dict[str, Callable[[float], str]] = {
    "time": lambda seconds: f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s",
    "giga": lambda number: f"{number / 1e9:,.1f}",
    "bytes": lambda number: f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB",
}


def write(value: Any, how: str) -> str:
    """A value for people; a dash for None."""
    return "-" if value is None else UNITS[how](value) if how in UNITS else format(value, how)


def format_table(rows: list[Row], columns: list[Column]) -> str:
    """Lines of a Markdown table, text to the left and numbers to the right; a column without a value is left out."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[title for _, title, _ in columns]]
    cells += [[write(row.get(key), how) for key, _, how in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if how == "" else ">" for _, _, how in columns]
    rule = {"<": "-", ">": ":"}
    cells.insert(1, ["-" * (width - 1) + rule[side] for width, side in zip(widths, sides, strict=True)])
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
