"""Config -> `Bench`: what every benchmark of `sltrain-bench` is given. What each measures in the rooms is in
bench_layer.py, bench_step.py and bench_data.py."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sltrain import kernels
from sltrain.api.bench_config import BenchConfig
from sltrain.benchmarks.machine import describe_machine, machine_line
from sltrain.building import Say
from sltrain.building.model import pick_dtype
from sltrain.config import TrainConfig
from sltrain.engine.distributed import pick_device

SEED = 42
SMALL_VOCAB = 4096  # for models without a vocabulary of their own: what experiment=quickstart gives them


@dataclass
class Result:
    """What a benchmark found."""

    rows: list[dict[str, Any]]
    text: str  # for people


@dataclass
class Bench:
    """A benchmark, its machine, and the time by which it should be done."""

    config: BenchConfig
    train: TrainConfig | None  # what=step and what=data: the run whose parts are measured
    device: torch.device
    dtype: torch.dtype
    deadline: float  # of time.monotonic
    say: Say  # one line of progress

    @property
    def machine(self) -> dict[str, Any]:
        """What the numbers depend on besides the code."""
        kernel = kernels.status() or "ready" if self.device.type == "cpu" else None
        return {**describe_machine(self.device, self.dtype), "cpu_kernel": kernel}

    @property
    def machine_line(self) -> str:
        """The same for people."""
        return machine_line(self.machine)


def build_bench(config: BenchConfig, train: TrainConfig | None, say: Say) -> Bench:
    """Raises ValueError for a device that is not there."""
    torch.manual_seed(SEED)
    device = pick_device(config.device)
    return Bench(config, train, device, pick_dtype(config.dtype, device), time.monotonic() + config.time_limit_s, say)


def vocab_size(bench: Bench) -> int:
    """Of the model whose parts are measured."""
    assert bench.train is not None
    return bench.train.model.vocab_size or SMALL_VOCAB


@torch.no_grad()
def leave_zero(module: nn.Module) -> None:
    """Training starts at B = 0 and leaves it at once; no product should be timed on zeros."""
    B = getattr(module, "B", None)
    if isinstance(B, nn.Parameter):
        B.normal_(0, 0.02)
