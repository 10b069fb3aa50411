"""torchrun starts a run again, from its last checkpoint, when one of its processes dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start launch/single_node.sh with the torchrun of this environment."""
    started = []

    def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        started.append(
            subprocess.Popen(
                [str(ROOT / "launch" / "single_node.sh"), *arguments],
                env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def rank_of(torchrun: int, rank: int) -> int:
    """The process number of a rank that torchrun started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid"))
            if int(parent) == torchrun and f"\0RANK={rank}\0" in (status.parent / "environ").read_text():
                return int(status.parent.name)
        except (OSError, StopIteration):
            continue  # it ended just now
    raise AssertionError(f"torchrun has no rank {rank}")


def losses(run: Path) -> list[Any]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in events if event["event"] in ("train", "final")]


def test_a_rank_that_is_killed_is_started_again_with_the_others(
    tiny: list[str], tmp_path: Path, launch: Launch, fork_train: Callable[..., Any]
) -> None:
    recipe = [*tiny, "global_batch_size=6", "micro_batch_size=2", "max_steps=30", "checkpoint_every=2"]
    straight = fork_train(*recipe, f"run_dir={tmp_path}/straight", num_ranks=3)
    run = tmp_path / "run"
    process = launch(*recipe, f"run_dir={run}", GPUS="3", MAX_RESTARTS="2")
    deadline = time.monotonic() + 240
    while not list(run.glob("checkpoints/step_0000000[4-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert out.count("resume     from step") == 1 and (run / "summary.json").exists()
    straight.communicate()
    assert losses(run) == losses(tmp_path / "straight")
