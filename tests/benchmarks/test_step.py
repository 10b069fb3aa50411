"""What is compared follows the time that is left, and rows compare with dense and with the published layer."""

import pytest
import torch
from torch import nn

from sltrain.benchmarks.step import (
    Alone,
    StepCandidate,
    Stepper,
    guessed_seconds,
    measure_each_alone,
    measure_steps,
    run_alone_in_here,
    step_table,
    step_task,
    those_that_fit,
)
from sltrain.benchmarks.timing import Task

IDS = torch.zeros(2, 16, dtype=torch.int64)


def candidate(name: str, multiply_adds: int, updates: list[str] | None = None, peak: int = 100) -> StepCandidate:
    done = updates if updates is not None else []

    def build() -> Stepper:
        done.append(f"build {name}")
        return Stepper(nn.Linear(2, 2), lambda ids: done.append(f"{name} {tuple(ids.shape)}"))

    return StepCandidate(name, build, lambda: Alone(peak, 0.01, 0.01), multiply_adds, 6, 4 * 6 * 4)


def test_the_last_candidates_go_first_and_the_first_stay() -> None:
    said: list[str] = []
    some = [candidate(name, 10) for name in "abcd"]
    assert [c.name for c in those_that_fit(some, lambda c: 10, 25, 1, said.append)] == ["a", "b"]
    assert "left out: c, d" in said[0] and "40 s" in said[0]
    assert [c.name for c in those_that_fit(some, lambda c: 10, 0, 3, said.append)] == ["a", "b", "c"]
    assert len(those_that_fit(some, lambda c: 10, 40, 0, pytest.fail)) == 4


def test_a_guess_grows_with_the_arithmetic() -> None:
    seconds = guessed_seconds(product_rate=100.0)
    assert seconds(candidate("a", 2000)) - seconds(candidate("b", 1000)) == pytest.approx(3 * 1.5 * 10)


def test_a_model_is_built_once_if_it_stays_and_for_each_turn_if_not() -> None:
    updates: list[str] = []
    task = step_task(candidate("a", 1, updates), IDS, stays=True)
    for _ in range(2):
        task.before(), task.run(), task.after()
    assert updates == ["build a", "a (1, 8)", "a (2, 16)", "a (2, 16)"]
    updates.clear()
    task = step_task(candidate("a", 1, updates), IDS, stays=False)
    for _ in range(2):
        task.before(), task.run(), task.after()
    assert updates == ["build a", "a (1, 8)", "a (2, 16)"] * 2


def test_alone_it_is_updated_twice_before_the_peak_is_read() -> None:
    updates: list[str] = []
    alone = run_alone_in_here(candidate("a", 1, updates).build, IDS, lambda: 100 * len(updates))
    assert updates == ["build a", "a (1, 8)", "a (2, 16)"]
    assert alone.peak_bytes == 300


def test_alone_the_last_candidates_are_left_out_when_time_is_over() -> None:
    said: list[str] = []
    done = measure_each_alone([candidate(name, 1) for name in "abcd"], 0, 2, said.append)
    assert [c.name for c in done] == ["a", "b"] and "left out: c, d" in said[-1]
    assert all(c.alone is not None for c in done)


def test_rows() -> None:
    candidates = [candidate("full", 300), candidate("uniform", 200), candidate("transformers_published", 200, peak=400)]
    rows = measure_steps(
        candidates,
        IDS,
        Task(lambda: None),
        10,
        memory_bytes=10**9,
        repeats=3,
        deadline=0,
        least=3,
        say=lambda line: None,
    )
    by_name = {row["measured"]: row for row in rows}
    full, uniform = by_name["full"], by_name["uniform"]
    assert (full["limit"], uniform["limit"]) == (1, 1.5)
    assert uniform["memory_over_published"] == 0.25
    assert uniform["tokens_per_second"] == pytest.approx(32 / uniform["seconds"])
    assert uniform["ratio_to_dense"] == pytest.approx(uniform["seconds"] / full["seconds"])
    assert uniform["share_of_limit"] == pytest.approx(full["seconds"] / uniform["seconds"] / 1.5)
    assert "transformers_published" in step_table(rows)
