"""Each schedule against a table drawn by hand, transformers' schedulers, and what any such schedule must satisfy."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.optim.schedule import SCHEDULES, RateSchedule, default_decay, effective_warmup

TABLE = {  # 8 updates, 4 of them warmup, down to a tenth; wsd decays over the last 2
    "cosine": [0.25, 0.5, 0.75, 1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1],
    "linear": [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1],
    "wsd": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.55, 0.1],
    "constant": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_hand(name: str) -> None:
    rates = RateSchedule(name, 8, 4, 0.1, decay_steps=2)
    assert [rates.factor(step) for step in range(1, 9)] == pytest.approx(TABLE[name], abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_update_k_has_the_factor_that_transformers_schedulers_have_after_k_steps(name: str) -> None:
    """Their first update has the rate of step 0; ours is shifted by one, so that it has that of step 1."""
    from transformers import optimization

    n, w, d = 40, 7, 9
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = {
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, w, n),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, w, n),
        "wsd": lambda: optimization.get_wsd_schedule(
            optimizer, w, d, num_stable_steps=n - w - d, decay_type="linear", min_lr_ratio=0.0
        ),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, w),
    }[name]
    scheduler, factors = theirs(), []
    for _ in range(n):
        optimizer.step()
        scheduler.step()
        factors += scheduler.get_last_lr()
    rates = RateSchedule(name, n, w, 0.0, d)
    assert [rates.factor(step) for step in range(1, n + 1)] == pytest.approx(factors, abs=1e-12)


def test_short_runs() -> None:
    for name in ("cosine", "linear", "wsd"):
        assert RateSchedule(name, 1, 0, 0.1).factor(1) == 0.1
        assert [RateSchedule(name, 2, 1, 0.0).factor(step) for step in (1, 2)] == [1.0, 0.0]


runs = st.integers(1, 5000).flatmap(
    lambda max_steps: st.tuples(st.just(max_steps), st.integers(0, max_steps - 1), st.floats(0, 1))
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SCHEDULES), runs, st.data())
def test_properties(name: str, run: tuple[int, int, float], data: st.DataObject) -> None:
    max_steps, warmup, ratio = run
    step = data.draw(st.integers(1, max_steps))
    rates = RateSchedule(name, max_steps, warmup, ratio, data.draw(st.integers(1, max_steps - warmup)))
    factor = rates.factor(step)
    assert 0 < factor <= 1 or (ratio == 0 and step == max_steps)
    assert rates.factor(max_steps) == (1 if name == "constant" else ratio)
    if warmup:
        assert rates.factor(warmup) == 1.0
    if step < warmup:
        assert rates.factor(step + 1) - factor == pytest.approx(1 / warmup)
    elif step < max_steps:
        assert rates.factor(step + 1) <= factor + 1e-15
    if step > warmup and name == "cosine":
        # The half-angle form of the same cosine.
        assert factor == pytest.approx(
            1 - (1 - ratio) * math.sin(math.pi / 2 * (step - warmup) / (max_steps - warmup)) ** 2
        )


def test_a_longer_run_agrees_where_the_rate_was_constant() -> None:
    """wsd: up to the update before its decay; constant: to the end; the others: in their warmup."""
    agreeing = {
        name: max(
            steps
            for steps in range(101)
            if RateSchedule(name, 100, 10, 0.1, 20).agrees(RateSchedule(name, 150, 10, 0.1, 30), steps)
        )
        for name in SCHEDULES
    }
    assert agreeing == {"cosine": 10, "linear": 10, "wsd": 80, "constant": 100}
    assert not RateSchedule("constant", 100, 10, 0.1).agrees(RateSchedule("constant", 150, 11, 0.1), 5)


def test_steps_outside_the_run_are_refused() -> None:
    for step in (0, 11):
        with pytest.raises(AssertionError):
            RateSchedule("cosine", 10, 2, 0.1).factor(step)


@given(st.integers(0, 1000), st.integers(1, 1000))
def test_the_decay_is_a_tenth_of_the_run_where_there_is_room(asked: int, max_steps: int) -> None:
    warmup, _ = effective_warmup(asked, max_steps)
    decay = default_decay(warmup, max_steps)
    assert 1 <= decay <= max_steps - warmup
    assert decay == max_steps // 10 or max_steps < 10 or warmup + max_steps // 10 > max_steps


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
