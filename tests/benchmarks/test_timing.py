"""Candidates are timed in turns, equally often, and each round begins with another one."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import sltrain.benchmarks.timing as timing_module
from sltrain.benchmarks.timing import MAX_REPEATS, MIN_REPEATS, Task, Timing, fitting_repeats, geometric_mean, in_turns

CPU = torch.device("cpu")


def test_rounds_rotate_after_one_warm_up() -> None:
    calls: list[str] = []
    tasks = {name: Task(lambda name=name: calls.append(name)) for name in "abc"}
    timings = in_turns(tasks, CPU, repeats=4, deadline=0, say=lambda line: None)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(timing.samples) == 4 for timing in timings.values())


def test_only_run_is_timed(clock_of: Callable[[ModuleType], Any]) -> None:
    clock = clock_of(timing_module)
    order: list[str] = []
    task = Task(
        lambda: (order.append("run"), clock.work(2.0)),
        before=lambda: (order.append("before"), clock.work(10.0)),
        after=lambda: (order.append("after"), clock.work(20.0)),
    )
    timing = in_turns({"a": task}, CPU, repeats=1, deadline=0, say=lambda line: None)["a"]
    assert order == ["before", "run", "after"] * 2
    assert timing.median == 2.0


def test_a_warm_up_of_its_own_stands_in_for_the_first_call() -> None:
    calls: list[str] = []
    task = Task(lambda: calls.append("run"), warm_up=lambda: calls.append("warm up"))
    in_turns({"a": task}, CPU, repeats=2, deadline=0, say=lambda line: None)
    assert calls == ["warm up", "run", "run"]


def test_repeats_follow_the_time_that_is_left() -> None:
    assert fitting_repeats(50, 10) == 5
    assert fitting_repeats(-3, 10) == MIN_REPEATS
    assert fitting_repeats(1e9, 10) == MAX_REPEATS


def test_a_row_compares_medians_and_fastest_samples() -> None:
    dense, other = Timing([2.0, 4.0, 6.0]), Timing([3.0, 1.0, 8.0])
    row = other.as_row(dense)
    assert (row["seconds"], row["ratio_to_dense"]) == (3.0, 0.75)
    assert (row["fastest_seconds"], row["fastest_ratio_to_dense"]) == (1.0, 0.5)
    assert other.as_row(None)["ratio_to_dense"] is None


def test_spread_leaves_out_a_quarter_at_each_end() -> None:
    assert Timing([1.0, 10.0, 11.0, 100.0]).spread == pytest.approx(0.5 / 10.5)


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(math.sqrt(16))
    assert geometric_mean([2.0, None]) is None
    assert geometric_mean([]) is None
