"""One update of a whole model: forward, backward and AdamW on full rows of random ids.

Each candidate first runs alone in a process of its own: that gives its peak memory and a first time, from which the
rounds are planned. Then all are timed in turns in this process. If their weights and moments do not fit side by side,
each is built anew for its turn.

    floor              the arithmetic of all products (projections, head, causal attention; 3 times forward, with
                       activation checkpointing the layers 4 times) over the rate of the machine's dense product
    limit              floor of full over floor of the candidate: the speed-up if nothing but products took time
    limit_of_products  the speed-up if everything but the products took as long as it does in full
    share_of_limit     measured speed-up over limit
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sltrain.benchmarks.table import Column, format_table, milliseconds, percent, size, two_digits
from sltrain.benchmarks.timing import MIN_REPEATS, Say, Task, Timing, in_turns

DENSE, PUBLISHED = "full", "transformers_published"
OVERHEAD = 1.5  # a step's time over its floor, for a first guess
START_SECONDS = 8  # to start a process and build the model, for a first guess


@dataclass
class Stepper:
    """A model and a function that updates it on ids (rows, tokens)."""

    model: nn.Module
    update: Callable[[Tensor], object]

    def first_update(self, ids: Tensor) -> None:
        """A tiny update: optimizer moments come into being, kernels are loaded."""
        self.update(ids[:1, :8])
        self.rest()

    def rest(self) -> None:
        """Let go of the gradients."""
        self.model.zero_grad(set_to_none=True)


@dataclass
class Alone:
    """What a candidate needed in a process of its own."""

    peak_bytes: int
    build_seconds: float
    step_seconds: float


@dataclass
class StepCandidate:
    """One way to train the model."""

    name: str
    build: Callable[[], Stepper]
    measure_alone: Callable[[], Alone]  # in another process
    multiply_adds: int  # of the products of an update
    num_parameters: int
    state_bytes: int  # weights, gradients and two moments
    path: str | None = None  # how W x is computed, where there is a choice
    alone: Alone | None = field(default=None, init=False)


def run_alone_in_here(build: Callable[[], Stepper], ids: Tensor, peak_bytes: Callable[[], int]) -> Alone:
    """What a candidate's own process does: build it, update it twice, and read the peak."""
    start = time.perf_counter()
    stepper = build()
    stepper.first_update(ids)
    built = time.perf_counter()
    stepper.update(ids)
    peak = peak_bytes()  # reading a GPU's counter does not wait, but an update reads its loss
    return Alone(peak, built - start, time.perf_counter() - built)


def those_that_fit(
    candidates: list[StepCandidate],
    seconds: Callable[[StepCandidate], float],
    seconds_left: float,
    least: int,
    say: Say,
) -> list[StepCandidate]:
    """The first candidates that together take the time that is left, `least` of them in any case."""
    kept = list(candidates)
    while len(kept) > least and sum(map(seconds, kept)) > seconds_left:
        kept.pop()
    if len(kept) < len(candidates):
        names = ", ".join(candidate.name for candidate in candidates[len(kept) :])
        say(
            f"left out: {names}; all together would take about {sum(map(seconds, candidates)):.0f} s, and "
            f"{max(seconds_left, 0):.0f} s are left of time_limit_s; candidates=[...] asks for them in spite of that"
        )
    return kept


def guessed_seconds(product_rate: float) -> Callable[[StepCandidate], float]:
    """What a candidate will take in all, from its floor at `product_rate` multiply-adds a second."""

    def seconds(candidate: StepCandidate) -> float:
        step_seconds = OVERHEAD * candidate.multiply_adds / product_rate
        return START_SECONDS + (1 + MIN_REPEATS) * step_seconds

    return seconds


def measure_each_alone(candidates: list[StepCandidate], deadline: float, least: int, say: Say) -> list[StepCandidate]:
    """Run each in a process of its own, one after the other, and return those that were: behind the first `least`, none
    once the time that is left is just enough for the others' turns."""
    done: list[StepCandidate] = []
    for candidate in candidates:
        turns = MIN_REPEATS * sum(other.alone.step_seconds for other in done if other.alone)
        if len(done) >= least and time.monotonic() + turns > deadline:
            names = ", ".join(other.name for other in candidates[len(done) :])
            say(f"left out: {names}; time_limit_s leaves no time for it (candidates=[...] asks for it all the same)")
            break
        candidate.alone = alone = candidate.measure_alone()
        say(f"{candidate.name}: {alone.step_seconds:.2f} s a step, peak {alone.peak_bytes / 1e9:.2f} GB, alone")
        done.append(candidate)
    return done


def measure_steps(
    candidates: list[StepCandidate],
    ids: Tensor,
    product: Task,
    product_multiply_adds: int,
    *,
    memory_bytes: int,
    repeats: int | None,
    deadline: float,
    least: int,
    say: Say,
) -> list[dict[str, Any]]:
    """A row for each candidate, the last ones left out if time gets short, but for `least` of them. `memory_bytes` is
    what the device has in all."""
    candidates = measure_each_alone(candidates, deadline, least, say)
    together = _fit_together(candidates, memory_bytes)
    if not together:
        say("the models do not fit side by side: each is built anew for its turn")

    def turn_seconds(candidate: StepCandidate) -> float:
        assert candidate.alone is not None
        return candidate.alone.step_seconds + (0 if together else candidate.alone.build_seconds)

    def seconds(candidate: StepCandidate) -> float:
        return turn_seconds(candidate) * (repeats or MIN_REPEATS)

    candidates = those_that_fit(candidates, seconds, deadline - time.monotonic(), least, say)
    tasks = {candidate.name: step_task(candidate, ids, together) for candidate in candidates}
    round_seconds = sum(map(turn_seconds, candidates))
    seconds_left = deadline - time.monotonic()
    if seconds_left < (MIN_REPEATS + 1) * round_seconds:  # no time for a warm-up at full size
        for task in tasks.values():
            task.warm_up = task.before
    tasks["product"] = product
    timings = in_turns(tasks, ids.device, repeats=repeats, deadline=deadline, say=say, round_seconds=round_seconds)
    rate = product_multiply_adds / timings.pop("product").median
    return _rows(candidates, timings, rate, ids.numel())


def _fit_together(candidates: list[StepCandidate], memory_bytes: int) -> bool:
    """Whether weights and moments of all, and one's gradients, take at most a third of the memory: activations, other
    processes and the caches of the allocator want the rest."""
    kept = sum(candidate.state_bytes * 3 / 4 for candidate in candidates)
    gradients = max(candidate.state_bytes for candidate in candidates) / 4
    return kept + gradients <= memory_bytes / 3


def step_task(candidate: StepCandidate, ids: Tensor, stays: bool) -> Task:
    """One update; the model stays from turn to turn, or is built before and dropped after each."""
    built: list[Stepper] = []

    def before() -> None:
        if not built:
            built.append(candidate.build())
            built[0].first_update(ids)

    def after() -> None:
        built[0].rest()
        if not stays:
            built.clear()
            gc.collect()

    return Task(lambda: built[0].update(ids), before, after)


def _rows(
    candidates: list[StepCandidate], timings: dict[str, Timing], rate: float, num_tokens: int
) -> list[dict[str, Any]]:
    by_name = {candidate.name: candidate for candidate in candidates}
    dense, published = by_name.get(DENSE), by_name.get(PUBLISHED)
    rows = []
    for name, candidate in by_name.items():
        assert candidate.alone is not None
        timing = timings[name]
        row: dict[str, Any] = {
            "measured": name,
            "path": candidate.path,
            **timing.as_row(timings.get(DENSE)),
            "tokens_per_second": num_tokens / timing.median,
            "peak_memory_bytes": candidate.alone.peak_bytes,
            "parameters": candidate.num_parameters,
            "floor_seconds": candidate.multiply_adds / rate,
        }
        if published is not None and published.alone is not None:
            row["speedup_over_published"] = timings[PUBLISHED].median / timing.median
            row["memory_over_published"] = candidate.alone.peak_bytes / published.alone.peak_bytes
        if dense is not None:
            dense_seconds = timings[DENSE].median
            row["limit"] = dense.multiply_adds / candidate.multiply_adds
            rest = dense_seconds - (dense.multiply_adds - candidate.multiply_adds) / rate
            row["limit_of_products"] = dense_seconds / rest if rest > 0 else None
            row["share_of_limit"] = dense_seconds / timing.median / row["limit"]
        rows.append(row)
    return rows


COLUMNS = [
    Column("measured", "measured"),
    Column("path", "path"),
    Column("seconds", "time", milliseconds),
    Column("spread", "+-", percent),
    Column("tokens_per_second", "tokens/s", lambda rate: f"{rate:,.0f}"),
    Column("ratio_to_dense", "time over full", two_digits),
    Column("limit", "speed-up limit", two_digits),
    Column("limit_of_products", "rest as in full", two_digits),
    Column("share_of_limit", "share of limit", percent),
    Column("peak_memory_bytes", "peak memory", size),
    Column("speedup_over_published", "speed-up over published", two_digits),
    Column("memory_over_published", "memory over published", two_digits),
]


def step_table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    return format_table(rows, COLUMNS)


def attention_multiply_adds(rows: int, tokens: int, hidden_size: int, num_layers: int) -> int:
    """Of one forward pass: scores and sums over the values, each position with those up to itself."""
    return rows * num_layers * hidden_size * tokens * (tokens + 1)
