"""The schedule against a table drawn by hand, an independent formula, and what any such schedule must satisfy."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.optim.schedule import effective_warmup, warmup_cosine


def test_by_hand() -> None:
    factors = [warmup_cosine(step, 8, 4, 0.1) for step in range(1, 9)]
    half = math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 0.55 + 0.45 * half, 0.55, 0.55 - 0.45 * half, 0.1]
    assert factors == pytest.approx(expected, abs=1e-15)


def test_short_runs() -> None:
    assert warmup_cosine(1, 1, 0, 0.1) == 0.1
    assert [warmup_cosine(step, 2, 1, 0.0) for step in (1, 2)] == [1.0, 0.0]


runs = st.integers(1, 5000).flatmap(
    lambda max_steps: st.tuples(st.just(max_steps), st.integers(0, max_steps - 1), st.floats(0, 1))
)


@settings(max_examples=200, deadline=None)
@given(runs, st.data())
def test_properties(run: tuple[int, int, float], data: st.DataObject) -> None:
    max_steps, warmup, ratio = run
    step = data.draw(st.integers(1, max_steps))
    factor = warmup_cosine(step, max_steps, warmup, ratio)
    assert 0 < factor <= 1 or (ratio == 0 and step == max_steps)
    assert warmup_cosine(max_steps, max_steps, warmup, ratio) == ratio
    if warmup:
        assert warmup_cosine(warmup, max_steps, warmup, ratio) == 1.0
    if step < warmup:
        assert warmup_cosine(step + 1, max_steps, warmup, ratio) - factor == pytest.approx(1 / warmup)
    elif step < max_steps:
        assert warmup_cosine(step + 1, max_steps, warmup, ratio) <= factor + 1e-15
    if step > warmup:
        # The half-angle form of the same cosine.
        assert factor == pytest.approx(
            1 - (1 - ratio) * math.sin(math.pi / 2 * (step - warmup) / (max_steps - warmup)) ** 2
        )


def test_steps_outside_the_run_are_refused() -> None:
    for step in (0, 11):
        with pytest.raises(AssertionError):
            warmup_cosine(step, 10, 2, 0.1)


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_effective_warmup_always_fits(asked: int, max_steps: int) -> None:
    warmup, message = effective_warmup(asked, max_steps)
    assert 0 <= warmup < max_steps
    assert (message is None) == (warmup == asked) or asked == warmup
    if asked < max_steps:
        assert warmup == asked and message is None
    else:
        assert message is not None and str(asked) in message and str(max_steps) in message and "\n" not in message


def test_needs_no_torch() -> None:
    code = "import sys, sltrain.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


def test_a_warmup_that_does_not_fit_becomes_a_tenth_of_the_run() -> None:
    assert effective_warmup(200, 100)[0] == 10
    assert effective_warmup(99, 100) == (99, None)
