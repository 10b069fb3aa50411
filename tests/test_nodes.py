"""Several machines, as launch/multi_node.sh starts a run on each: network namespaces with addresses of their own
(nodes.py). One is slow, one loses its power, one is cut off; the run goes on from its last checkpoint.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import Node, need_namespaces, nodes

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds, on a busy machine
LIMIT = 15.0  # seconds without a sign of a machine

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def namespaces() -> None:
    need_namespaces()


class Cluster:
    """A run on several machines."""

    def __init__(self, machines: list[Node], folder: Path, overrides: list[str]) -> None:
        self.machines, self.run_dir, self.logs = machines, folder / "run", folder / "logs"
        self.overrides = [*overrides, f"run_dir={self.run_dir}"]
        self.logs.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []
        self.attempts = 0

    def start(self) -> None:
        """As a user types it on each machine."""
        self.attempts += 1
        self.started = []
        for rank, machine in enumerate(self.machines):
            environment = {
                "NNODES": str(len(self.machines)),
                "NODE_RANK": str(rank),
                "MASTER_ADDR": self.machines[0].address,
                "GPUS": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            command = ["bash", str(ROOT / "launch" / "multi_node.sh"), *self.overrides]
            self.started.append(machine.start(command, self._log(rank), environment))

    def _log(self, rank: int) -> Path:
        return self.logs / f"{self.attempts}_{rank}"

    def said(self, rank: int) -> str:
        """What a machine printed since the last start."""
        return self._log(rank).read_text()

    def events(self) -> list[dict]:
        file = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_until_saved(self) -> None:
        """Until a checkpoint is complete and an update after it was made."""
        end = time.monotonic() + PATIENCE
        while not any(self.run_dir.glob("checkpoints/step_*")):
            assert time.monotonic() < end and self.started[0].poll() is None, self.said(0)
            time.sleep(0.05)

    def codes(self, *ranks: int) -> list[int]:
        """The exit codes of these machines' scripts, which end by themselves."""
        return [self.started[rank].wait(PATIENCE) for rank in ranks]


@pytest.fixture
def cluster(tmp_path: Path, tiny: list[str]) -> Iterator[Callable[..., Cluster]]:
    """Makes a run on so many machines; they are removed at the end."""
    opened = []

    def make(number: int, *overrides: str) -> Cluster:
        network = nodes(number)
        machines = network.__enter__()
        opened.append(network)
        return Cluster(machines, tmp_path, [*tiny, *overrides])

    yield make
    for network in opened:
        network.__exit__(None, None, None)


def losses(events: list[dict]) -> dict[int, float]:
    """The loss of each update; of those that were made again, the last."""
    return {event["step"]: event["loss"] for event in events if event["event"] == "train"}


def test_a_slow_machine_changes_nothing_but_the_time(
    cluster: Callable[..., Cluster],
    tiny: list[str],
    tmp_path: Path,
    sltrain_train: Callable[..., tuple[int, str, str]],
    metrics_of: Callable[[Path], list[dict]],
) -> None:
    two = cluster(2)
    two.machines[1].slow("10mbit")
    two.start()
    assert two.codes(0, 1) == [0, 0], two.said(0) + two.said(1)
    assert "2 processes" in two.said(0) and "finished" in two.said(0)
    code, _, err = sltrain_train(*tiny, f"run_dir={tmp_path / 'alone'}")
    assert code == 0, err
    alone = losses(metrics_of(tmp_path / "alone"))
    assert losses(two.events()) == pytest.approx(alone, rel=1e-5) and len(alone) == 6


def test_a_machine_is_killed_and_the_run_goes_on(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3, "max_steps=300", "checkpoint_every=20", "global_batch_size=12")
    three.start()
    three.wait_until_saved()
    three.machines[2].kill()
    assert all(three.codes(0, 1))
    for rank in (0, 1):
        told = [line for line in three.said(rank).splitlines() if "another process of the run is gone" in line]
        assert len(told) == 1 and "continue" in told[0], three.said(rank)
        assert "sltrain/engine" not in three.said(rank), "a traceback"
    goes_on(three, 300)


def test_a_machine_is_cut_off_and_the_run_goes_on(cluster: Callable[..., Cluster]) -> None:
    two = cluster(2, "max_steps=300", "checkpoint_every=20", f"hang_timeout={LIMIT:g}")
    two.start()
    two.wait_until_saved()
    two.machines[1].cut()
    cut = time.monotonic()
    assert all(two.codes(0, 1))
    assert time.monotonic() - cut > LIMIT / 2
    assert "error: rank 1 hangs (process " in two.said(0) and f"no sign of it for {LIMIT:g} s" in two.said(0)
    assert "the machine of rank 0 is gone, or this one is cut off" in two.said(1), two.said(1)
    two.machines[1].mend()
    goes_on(two, 300)


def goes_on(run: Cluster, max_steps: int) -> None:
    """Typed again on all machines, it continues from its last checkpoint to the end, each update made."""
    run.start()
    assert not any(run.codes(*range(len(run.machines)))), run.said(0)
    said = run.said(0)
    assert "finished" in said and re.search(r"resum|continue", said), said
    assert sorted(losses(run.events())) == list(range(1, max_steps + 1))
