"""Candidates are timed in turns, equally often, and each round begins with another one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sltrain.benchmarks.timing as timing_module
from sltrain.benchmarks.timing import MAX_REPEATS, MIN_REPEATS, Task, compare, fill_zeros, in_turns, product_task


def test_rounds_rotate_after_one_warm_up() -> None:
    calls: list[str] = []
    tasks = {name: Task(lambda name=name: calls.append(name)) for name in "abc"}
    timings = in_turns(tasks, repeats=4, deadline=0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {len(timing.times) for timing in timings.values()} == {4}


def test_only_run_is_timed_and_only_after_the_warm_up(clock_of: Callable[..., Any]) -> None:
    clock = clock_of(timing_module)
    seconds = iter([100.0, 2.0, 4.0, 9.0])  # the first is the warm-up
    task = Task(lambda: clock.work(next(seconds)), before=lambda: clock.work(10.0), after=lambda: clock.work(20.0))
    timing = in_turns({"a": task}, repeats=3, deadline=0, clock=clock.perf_counter)["a"]
    assert timing.times == [2.0, 4.0, 9.0] and timing.median == 4.0


def test_work_is_timed_by_the_unit(clock_of: Callable[..., Any]) -> None:
    clock = clock_of(timing_module)
    work = iter([1, 5, 10])

    def run() -> int:
        units = next(work)
        clock.work(3.0 * units)
        return units

    timing = in_turns({"a": Task(run)}, repeats=2, deadline=0, clock=clock.perf_counter)["a"]
    assert timing.times == [3.0, 3.0]


@pytest.mark.parametrize(("deadline", "repeats"), [(65, 5), (0, MIN_REPEATS), (1e9, MAX_REPEATS)])
def test_repeats_follow_the_time_that_is_left(deadline: float, repeats: int, clock_of: Callable[..., Any]) -> None:
    """A round takes 10 s, and the warm-up is one."""
    clock = clock_of(timing_module)
    timing = in_turns({"a": Task(lambda: clock.work(10.0))}, repeats=None, deadline=deadline)["a"]
    assert len(timing.times) == repeats


def test_a_row_compares_medians_and_fastest_samples(clock_of: Callable[..., Any]) -> None:
    clock = clock_of(timing_module)
    samples = {"dense": iter([0, 2.0, 4.0, 6.0]), "other": iter([0, 3.0, 1.0, 8.0])}
    tasks = {name: Task(lambda name=name: clock.work(next(samples[name]))) for name in samples}
    timings = in_turns(tasks, repeats=3, deadline=0, clock=clock.perf_counter)
    row = compare(timings["other"], timings["dense"])
    assert (row["seconds"], row["ratio_to_dense"], row["repeats"]) == (3.0, 0.75, 3)
    assert (row["fastest_seconds"], row["fastest_ratio_to_dense"]) == (1.0, 0.5)
    assert row["spread"] == pytest.approx((5.5 - 2.0) / 2 / 3.0)  # quartiles of 1, 3, 8
    assert compare(timings["other"], None)["ratio_to_dense"] is None


def test_the_unit_of_a_product_is_a_multiply_add() -> None:
    assert product_task(3, (5, 7), times=2).run() == 2 * 3 * 5 * 7


def test_zeros_get_values_and_nothing_else_changes() -> None:
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.bias)
    weight = module.weight.detach().clone()
    fill_zeros(module)
    assert module.bias.all() and torch.equal(module.weight, weight)
