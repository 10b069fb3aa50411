"""Several candidates timed in one run, in turns.

A machine's speed drifts: clocks follow temperature, and neighbours come and go. So no candidate is timed twice in a
row: a round runs each once, the next round begins one further on (nobody always follows the same neighbour), and what
is compared are medians over the rounds of one run. The warm-up round is not counted; it says how many rounds fit into
the time that is left.

On CUDA a call is timed between two events on its stream, so that the time is the GPU's, with what the host could not
hide; on the CPU by the clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

MIN_REPEATS = 2
MAX_REPEATS = 15

Say = Callable[[str], None]


@dataclass
class Task:
    """One candidate. `run` is timed; `before` and `after` are not. `warm_up` stands in for all three in the warm-up."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    warm_up: Callable[[], object] | None = None


@dataclass
class Timing:
    """The times of one candidate, in seconds."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the slowest and the fastest sample but a quarter at each end, over the median."""
        ordered = sorted(self.samples)
        cut = len(ordered) // 4
        return (ordered[-1 - cut] - ordered[cut]) / 2 / self.median

    def as_row(self, dense: "Timing | None") -> dict[str, float | None]:
        """What a row says of it. The fastest samples are there for busy machines, where a median holds the
        neighbours' work too."""
        return {
            "seconds": self.median,
            "ratio_to_dense": None if dense is None else self.median / dense.median,
            "spread": self.spread,
            "fastest_seconds": min(self.samples),
            "fastest_ratio_to_dense": None if dense is None else min(self.samples) / min(dense.samples),
            "repeats": len(self.samples),
        }


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs another and returns the seconds it took on `device`."""

    def on_host(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def on_cuda(run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return on_cuda if device.type == "cuda" else on_host


def run_once(task: Task, time_it: Callable[[Callable[[], object]], float]) -> float:
    """Seconds of one call, with what belongs before and after it."""
    task.before()
    seconds = time_it(task.run)
    task.after()
    return seconds


def in_turns(
    tasks: dict[str, Task],
    device: torch.device,
    *,
    repeats: int | None,
    deadline: float,
    say: Say,
    round_seconds: float | None = None,
) -> dict[str, Timing]:
    """Time each task `repeats` times after one warm-up; None: as often as fits before `deadline` (time.monotonic).
    `round_seconds` is what a round takes, if that is known; None: as long as the warm-up."""
    time_it = stopwatch(device)
    start = time.monotonic()
    for task in tasks.values():
        if task.warm_up is None:
            run_once(task, time_it)
        else:
            task.warm_up()
    round_seconds = time.monotonic() - start if round_seconds is None else round_seconds
    if repeats is None:
        repeats = fitting_repeats(deadline - time.monotonic(), round_seconds)
    say(f"{len(tasks)} candidates, {repeats} rounds of about {round_seconds:.1f} s")
    names = list(tasks)
    timings = {name: Timing() for name in names}
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            timings[name].samples.append(run_once(tasks[name], time_it))
    return timings


def fitting_repeats(seconds_left: float, round_seconds: float) -> int:
    """Rounds that fit into the time left, within bounds that give a median a meaning."""
    return max(MIN_REPEATS, min(MAX_REPEATS, int(seconds_left / max(round_seconds, 1e-9))))


def product_task(
    num_rows: int, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype, times: int = 1
) -> Task:
    """The dense product of a linear layer, (num_rows, in) x (in, out), `times` in a row, with nothing around it. What
    it takes gives the rate of the machine's products: times * num_rows * out * in multiply-adds over its time."""
    x = torch.randn(num_rows, in_features, device=device, dtype=dtype)
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype)

    def run() -> None:
        for _ in range(times):
            x @ weight.t()  # noqa: B018

    return Task(run)


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """None if a value is missing."""
    present = [value for value in values if value is not None]
    return statistics.geometric_mean(present) if present and len(present) == len(values) else None
