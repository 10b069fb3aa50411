"""The predicted goodput against the formula, and its bookkeeping against a clock that ticks."""

import pytest

from faults.predict import Job, _train, duration, table


@pytest.mark.parametrize("gpus", [8, 64, 1_024])
@pytest.mark.parametrize("rate", [4.7e-4, 3.0e-3])
def test_the_simulation_agrees_with_the_formula(gpus: int, rate: float) -> None:
    """To first order: some classes lose no updates, others wait longer, which shifts it by a fraction of the loss."""
    job = Job(gpus, rate)
    assert job.simulate(seed=1) == pytest.approx(job.formula(), abs=0.1 * (1 - job.formula()))


def test_other_intervals_are_worse() -> None:
    job = Job(1_024, 3.0e-3)
    best = job.simulate(seed=0)
    assert best > job.simulate(seed=0, interval=job.best_interval / 3) + 0.005
    assert best > job.simulate(seed=0, interval=job.best_interval * 3) + 0.005


@pytest.mark.parametrize("since_save", [0, 3, 9])
@pytest.mark.parametrize("seconds", [0, 1, 6, 10, 11, 13, 25, 100])
def test_training_and_saving_in_turn(seconds: int, since_save: int) -> None:
    """Second by second, with 10 seconds of training between saves of 3."""
    trained, unsaved, saving = 0, since_save, 0
    for _ in range(seconds):
        if unsaved == 10:
            saving += 1
            if saving == 3:
                unsaved = saving = 0
        else:
            trained, unsaved = trained + 1, unsaved + 1
    assert _train(seconds, since_save, 10, 3) == (trained, unsaved)


def test_the_table_says_every_size() -> None:
    lines = table(30.0, 300.0).splitlines()
    assert [line.split()[3] for line in lines[1:]] == ["8", "64", "1024"] * 2
    assert duration(7_200) == "2.0 h" and duration(59) == "59 s"
