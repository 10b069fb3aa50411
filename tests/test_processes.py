"""Any number of processes that divides the batch trains the run of one, and may take it over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resuming import stopped_at

pytestmark = pytest.mark.slow

Start = Callable[..., Any]
BATCH = ["global_batch_size=12", "micro_batch_size=2", "checkpoint_every=1", "keep_last=99"]  # 6 streams of two rows


def assert_same_curve(ours: Path, theirs: Path) -> None:
    """Assert the same updates on the same tokens, and losses within what the order of a sum may change."""
    for a, b in zip(updates(ours), updates(theirs), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def updates(run: Path) -> list[dict[str, Any]]:
    """The train and final lines of a run."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] in ("train", "final")]


@pytest.fixture(scope="module")
def one(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process."""
    import sltrain

    folder = tmp_path_factory.mktemp("runs") / "one"
    sltrain.train(overrides=[*tiny, *BATCH, f"run_dir={folder}"])
    return folder


def run_on(fork_train: Start, num_ranks: int, *typed: str) -> None:
    process = fork_train(*typed, num_ranks=num_ranks)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


def test_three_ranks_continue_a_run_of_one_and_four_take_it_over(
    tiny: list[str], one: Path, tmp_path: Path, fork_train: Start
) -> None:
    """Four ranks share six streams unevenly."""
    run_on(fork_train, 3, f"run_dir={stopped_at(one, 2, tmp_path / 'three')}")
    assert_same_curve(tmp_path / "three", one)
    four = stopped_at(tmp_path / "three", 4, tmp_path / "four")
    run_on(fork_train, 4, f"run_dir={four}", "micro_batch_size=3")
    assert_same_curve(four, one)


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(
    tiny: list[str], tmp_path: Path, fork_train: Start
) -> None:
    process = fork_train(*tiny, *BATCH, f"run_dir={tmp_path}/run", num_ranks=5)
    _, err = process.communicate()
    assert process.returncode == 2 and not (tmp_path / "run").exists()
    assert err.splitlines() == [
        "error: global_batch_size=12 is not a multiple of micro_batch_size=2 x 5 processes; the nearest that fit:"
        " 6 processes, or global_batch_size=10"
    ]
