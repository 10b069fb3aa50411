"""Candidates timed in turns, in one process.

The speed of a machine drifts with temperature and with what else runs on it. Each round therefore runs every candidate
once and starts with another one than the round before, and a result is the median over the rounds. A warm-up round is
not counted; its duration decides how many rounds fit into the time left.

Clock and statistics are those of torch.utils.benchmark; the clock synchronizes the GPU. Its Timer would run one
candidate several times in a row.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import benchmark
from torch.utils.benchmark import Measurement, TaskSpec

from sltrain.numeric import is_stand_in

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
MIN_REPEATS, MAX_REPEATS = 2, 15


@dataclass
class Task:
    """One candidate. `run` is timed, `before` and `after` are not. If `run` returns a number of units of work, the
    time is that of one unit."""

    run: Callable[[], int | None]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None

    def seconds(self, clock: Callable[[], float]) -> float:
        """Run once; seconds for one unit of work."""
        self.before()
        start = clock()
        units = self.run()
        seconds = clock() - start
        self.after()
        return seconds / (units or 1)


def in_turns(
    tasks: dict[K, Task],
    *,
    repeats: int | None,
    deadline: float,
    clock: Callable[[], float] = benchmark.timer,
) -> dict[K, Measurement]:
    """Time each task `repeats` times after one warm-up; None: as often as fits before `deadline` (time.monotonic)."""
    start = time.monotonic()
    for task in tasks.values():
        task.seconds(clock)
    round_seconds = time.monotonic() - start
    if repeats is None:
        fitting = int((deadline - time.monotonic()) / max(round_seconds, 1e-9))
        repeats = max(MIN_REPEATS, min(MAX_REPEATS, fitting))
    logger.info(f"{len(tasks)} candidates, {repeats} rounds of about {round_seconds:.1f} s")
    names = list(tasks)
    samples: dict[K, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(tasks[name].seconds(clock))
    return {name: Measurement(1, samples[name], TaskSpec(str(name), "")) for name in names}


def compare(timing: Measurement, dense: Measurement | None) -> dict[str, float | None]:
    """The columns of a row that describe a timing. The spread is half the interquartile range over the median. The
    fastest sample is given too, because on a busy machine the median includes the work of other processes."""
    return {
        "seconds": timing.median,
        "ratio_to_dense": timing.median / dense.median if dense else None,
        "spread": timing.iqr / 2 / timing.median,
        "fastest_seconds": min(timing.times),
        "fastest_ratio_to_dense": min(timing.times) / min(dense.times) if dense else None,
        "repeats": len(timing.times),
    }


def product_task(num_rows: int, sides: Sequence[int], times: int = 1, **like: Any) -> Task:
    """The product x W^T with a dense W (out, in) = `sides`, `times` in a row. The unit of work is a multiply-add."""
    out_features, in_features = sides
    x, weight = torch.randn(num_rows, in_features, **like), torch.randn(out_features, in_features, **like)

    def run() -> int:
        for _ in range(times):
            x @ weight.t()  # noqa: B018
        return times * num_rows * out_features * in_features

    return Task(run)


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """Give random values to parameters that are all zero, such as a new B, which training changes at once."""
    for parameter in module.parameters():
        if parameter.numel() and not is_stand_in(parameter) and not parameter.any():
            parameter.normal_(0, 0.02)
