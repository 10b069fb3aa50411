"""A rank that hangs ends the run and is named; one that works for long does not."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sltrain.engine import watch
from sltrain.engine.watch import ENDLESS, Told, Watch
from sltrain.errors import ExitCode

Start = Callable[..., Any]


def watch_that_heard(*others: tuple[Told | None, float], begun: int = 12) -> Watch:
    """The watch of rank 0, whose main thread has waited for 100 seconds; `others`: what each other rank told, and how
    many seconds ago its beat grew."""
    now = time.monotonic()
    counts = iter([0])  # where `at` asks; then all of them
    watched = Watch(0, len(others) + 1, 10.0, connect=lambda: None, count=lambda: next(counts, begun))
    watched.at("update 3")
    watched._moved, watched._begun, watched._contact = now - 100, begun, now
    watched._heard = {rank: (told, now - ago) for rank, (told, ago) in enumerate(others, start=1)}
    return watched


def told(collectives: int, age: float = 100.0, patience: float = 0.0, number: int = 1) -> Told:
    return Told(5, number, collectives, "update 3", "engine/step.py:1", age, patience, "process 7 on b")


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([(told(12), 1.0), (told(12), 11.0)], ["rank 2 hangs (process 7 on b): no sign of it for 10 s", "update 3"]),
        ([(told(12), 1.0), (None, 11.0)], ["rank 2 hangs (it never joined)"]),
        ([(told(12), 1.0), (None, 5.0)], None),
        ([(told(12), 1.0), (told(11), 1.0)], ["rank 2 hangs", "at update 3 (engine/step.py:1) for 100 s", "not reach"]),
        ([(told(12), 1.0), (told(11, age=5.0), 1.0)], None),  # it moves
        ([(told(12), 1.0), (told(11, patience=ENDLESS), 1.0)], None),  # it saves
        ([(told(12), 1.0), (told(11, patience=80.0), 1.0)], ["rank 2 hangs"]),
        ([(told(12), 1.0), (told(12), 1.0)], ["all ranks are at collective 12 (of update 3;", "GPU"]),
        ([(told(12), 1.0), (told(13, age=1.0), 1.0)], None),
        ([(told(12), 1.0), (told(40, number=0), 1.0)], ["rank 2 hangs"]),  # in what came before
        ([(told(12), 1.0), (told(1, number=2, age=1.0), 1.0)], None),  # it is at what comes next
    ],
)
def test_who_hangs(others: list[tuple[Told | None, float]], words: list[str] | None) -> None:
    verdict = watch_that_heard(*others).verdict(time.monotonic())
    if words is None:
        assert verdict is None
    else:
        assert verdict is not None and all(word in verdict for word in words), verdict
        assert "\n" not in verdict and "hang_timeout=10" in verdict


def test_ranks_with_other_numbers_of_collectives_in_a_save_are_compared_anew_after_it() -> None:
    """With parallel=hsdp the processes of the second copy have none of the first one's. Rank 2 is of it, and waits as
    this one does for the text of rank 1."""
    begun = 0
    watched = Watch(0, 3, 10.0, connect=lambda: None, count=lambda: begun)
    watched.at("the checkpoint of step 3")
    begun += 500
    watched.at("the text of update 4", ENDLESS)
    watched.at("update 4")
    begun += 1
    assert watched._told().place == (3, 1)
    now = time.monotonic()
    watched._heard = {1: (told(0, number=2, patience=ENDLESS), now), 2: (told(1, number=3), now)}
    watched._moved -= 100
    assert watched.verdict(now) is None


def test_a_rank_that_saves_ends_its_save_though_one_that_waits_for_it_falls_silent() -> None:
    saves = watch_that_heard((told(12), 1.0), (told(13), 11.0))
    saves._patience = ENDLESS
    assert saves.verdict(time.monotonic()) is None
    saves._patience = 0.0
    assert "rank 2 hangs" in (saves.verdict(time.monotonic()) or "")


def test_a_store_that_is_gone_ends_a_rank_that_waits() -> None:
    watched = watch_that_heard((told(12), 1.0))
    watched._contact -= 11
    assert "has not answered for 10 s" in (watched.verdict(time.monotonic()) or "")


def test_only_the_first_rank_that_waits_prints_the_verdict() -> None:
    watched = watch_that_heard((told(12), 1.0), (told(11), 1.0))
    assert watched._speaks()
    watched.rank, watched._heard = 1, {0: (told(12), time.monotonic()), 2: (told(11), time.monotonic())}
    assert not watched._speaks()
    watched._heard[0] = told(11), time.monotonic()  # rank 0 is the one that hangs
    assert watched._speaks()
    assert watch.EXIT_CODE == ExitCode.RANK_LOST


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_and_the_run_continues(
    tiny: list[str], tmp_path: Path, fork_train: Start
) -> None:
    recipe = [*tiny, "global_batch_size=6", "micro_batch_size=2", "max_steps=40", "checkpoint_every=1"]
    run = [*recipe, "hang_timeout=6", f"run_dir={tmp_path}/run"]
    process = fork_train(*run, num_ranks=3)
    hangs = process.children[1]
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step_00000003")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(hangs.pid, signal.SIGSTOP)
    for child in (process.children[0], process.children[2]):
        child.join(60)
        assert child.exitcode == ExitCode.RANK_LOST
    os.kill(hangs.pid, signal.SIGKILL)
    out, err = process.communicate()
    said = [line for line in err.splitlines() if "error:" in line]
    assert len(said) == 1 and f"rank 1 hangs (process {hangs.pid} on " in said[0], out + err
    assert "no sign of it for 6 s" in said[0] and "It did not reach collective" in said[0]
    again = fork_train(*recipe, "micro_batch_size=3", f"run_dir={tmp_path}/run", num_ranks=2)
    out, err = again.communicate()
    assert again.returncode == 0 and "resume     from step" in out, out + err
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, 41))


@pytest.mark.slow
def test_a_process_that_is_killed_costs_one_line_of_each_other(
    tiny: list[str], tmp_path: Path, fork_train: Start
) -> None:
    process = fork_train(*tiny, "max_steps=200", "checkpoint_every=1", f"run_dir={tmp_path}/run", num_ranks=2)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step_00000003")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.children[1].kill()
    process.children[0].join(60)
    assert process.children[0].exitcode == ExitCode.RANK_LOST
    _, err = process.communicate()
    said = [line for line in err.splitlines() if "error:" in line]
    assert len(said) == 1 and said[0].startswith("error: another process of the run is gone"), err
    assert "is saved: to continue: sltrain-train run_dir=" in said[0] and "Traceback" not in err
