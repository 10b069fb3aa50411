"""One start of a training command with faults inside, from its beginning to the end of its last process.

A start is `commands`: `python -m sltrain train ...`, or torchrun, as a user types it; or `forked`: children of this
process, which has imported torch once, run the same main function. Both are processes of their own; the second saves
some seconds a start. Where one process of several fails, the others get SIGTERM and, if they stay, SIGKILL, as
torchrun does. What a process cannot do to itself is done from here: a node that goes takes all its processes along, one
that stands still goes on, or is given up.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import hooks

ROOT = Path(__file__).resolve().parents[2]
LONGEST_START = 600.0  # seconds
HANG_PATIENCE = 2.0  # seconds until the campaign ends a process that stands still alone
HANG_TIMEOUT = 15  # hang_timeout of the runs: of several processes the others end, and say for whom they waited
GRACE = 3.0  # seconds that the others have to end by themselves after one failed


@dataclass
class Ended:
    """How a start ended."""

    codes: list[int]  # of each rank (forked), or of the command; minus the signal that killed it
    said: str  # standard output and standard error of all
    journals: list[list[dict[str, Any]]]  # of each rank, see hooks.py
    seconds: float
    cpu_seconds: float  # of all its processes that were waited for
    gave_up: bool = False  # it ran longer than LONGEST_START

    @property
    def fired(self) -> list[dict[str, Any]]:
        """The faults that came, each once, in the order in which they came."""
        events = [event for journal in self.journals for event in journal if "fired" in event]
        return sorted(events, key=lambda event: event["fired"])


@dataclass
class Launch:
    """What to start: the overrides, the number of processes, and for each of them its faults."""

    overrides: list[str]
    processes: int
    faults: list[list[dict[str, Any]]]
    run_dir: Path
    text: Path
    folder: Path  # for journals and output, of this start alone
    document_tokens: tuple[int, int]
    environment: dict[str, str] = field(default_factory=dict)

    def orders(self, rank: int) -> dict[str, Any]:
        """What hooks.py is told on this rank."""
        return {
            "journal": str(self.journal(rank)),
            "run_dir": str(self.run_dir),
            "text": str(self.text),
            "document_tokens": self.document_tokens,
            "faults": self.faults[rank],
        }

    def journal(self, rank: int) -> Path:
        return self.folder / f"journal.{rank}"

    @property
    def arguments(self) -> list[str]:
        return [*self.overrides, f"run_dir={self.run_dir}"]


def import_once() -> None:
    """Import what a run imports, so that forked children need not; before the first of them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch._dynamo  # what every optimizer imports when it is made

    import sltrain.building.run  # noqa: F401
    import sltrain.commands.train  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # children share these pages


def start_forked(launch: Launch) -> Ended:
    """Run the command in forked children, one a rank."""
    launch.folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": launch.processes,
        "LOCAL_WORLD_SIZE": launch.processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    pids = []
    for rank in range(launch.processes):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank} if launch.processes > 1 else {}
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _be_rank(launch, rank, {key: str(value) for key, value in own.items()})
        pids.append(pid)
    return _Watch(launch, pids).until_the_end()


def start_command(launch: Launch) -> Ended:
    """Run the command as a user types it."""
    launch.folder.mkdir(parents=True)
    orders = launch.folder / "orders.json"
    orders.write_text(json.dumps([launch.orders(rank) for rank in range(launch.processes)]))
    command = [sys.executable, "-m", "sltrain", "train"]
    paths = [str(Path(__file__).parent / "inject"), os.environ.get("PYTHONPATH") or str(ROOT)]
    environment = {**os.environ, **launch.environment, "SLTRAIN_FAULTS": str(orders), "PYTHONPATH": ":".join(paths)}
    if launch.processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={launch.processes}"]
        command = [sys.executable, "-m", *torchrun, "-m", "sltrain.train"]
        environment["TORCHRUN_CAMPAIGN"] = "1"
    with open(launch.folder / "said", "wb") as said:
        process = subprocess.Popen([*command, *launch.arguments], stdout=said, stderr=said, env=environment)
    ended = _Watch(launch, [process.pid]).until_the_end()
    process.returncode = ended.codes[0]  # it was waited for here
    return ended


STARTERS: dict[str, Callable[[Launch], Ended]] = {"forked": start_forked, "commands": start_command}


def _be_rank(launch: Launch, rank: int, environment: dict[str, str]) -> None:
    """Become the process of a rank. Does not return."""
    code = 1
    try:
        import torch

        torch.set_num_threads(1)  # a forked OpenMP pool would never answer
        os.environ.update(launch.environment)
        os.environ.update(environment, TOKENIZERS_PARALLELISM="false")  # nor would that library's threads
        output = os.open(launch.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        installed = hooks.install(launch.orders(rank))
        from sltrain.commands.train import main

        sys.argv = ["sltrain-train", *launch.arguments]
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        installed.close()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class _Watch:
    """Watches the processes of a start, and does what they cannot do to themselves."""

    def __init__(self, launch: Launch, pids: list[int]) -> None:
        self.launch, self.pids = launch, pids
        self.codes: dict[int, int] = {}
        self.read_until = [0] * launch.processes  # bytes of each journal
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.has_failed = False
        self.cpu_seconds = 0.0
        self.stopped: set[int] = set()  # for good
        self.gave_up = False

    def until_the_end(self) -> Ended:
        begin = time.monotonic()
        while len(self.codes) < len(self.pids):
            self._collect()
            for event in self._new_faults():
                self._help(event)
            due = [timer for timer in self.timers if timer[0] <= time.monotonic()]
            self.timers = [timer for timer in self.timers if timer not in due]
            for _, act in due:
                act()
            if time.monotonic() - begin > LONGEST_START and not self.gave_up:
                self._give_up()
            time.sleep(0.01)
        seconds = time.monotonic() - begin
        said = self.launch.folder / "said"
        journals = [read_lines(self.launch.journal(rank)) for rank in range(self.launch.processes)]
        text = said.read_text(errors="replace") if said.exists() else ""
        return Ended([self.codes[pid] for pid in self.pids], text, journals, seconds, self.cpu_seconds, self.gave_up)

    def _collect(self) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    self.cpu_seconds += used.ru_utime + used.ru_stime
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if self.stopped and self.stopped.issuperset(pid for pid in self.pids if pid not in self.codes):
            self._signal_all(signal.SIGKILL)
        if not self.has_failed and any(self.codes.values()) and len(self.pids) > 1:
            self.has_failed = True
            self._later(GRACE, lambda: self._signal_all(signal.SIGTERM))
            self._later(2 * GRACE, lambda: self._signal_all(signal.SIGKILL))

    def _new_faults(self) -> Iterator[dict[str, Any]]:
        for rank in range(self.launch.processes):
            with contextlib.suppress(FileNotFoundError), open(self.launch.journal(rank), "rb") as file:
                file.seek(self.read_until[rank])
                lines = file.read()
                complete = lines[: lines.rfind(b"\n") + 1]
                self.read_until[rank] += len(complete)
                yield from (event for event in map(json.loads, complete.splitlines()) if "fired" in event)

    def _help(self, event: dict[str, Any]) -> None:
        if event["effect"] == "node":
            self._signal_all(signal.SIGKILL)
        elif event["effect"] == "hang":
            if self.launch.processes == 1:
                self._later(HANG_PATIENCE, lambda: self._signal_all(signal.SIGKILL))
            else:
                self.stopped.add(event["pid"])
                self._later(6 * HANG_TIMEOUT, self._give_up)
        elif event["effect"] == "slow":
            self._later(event["seconds"], lambda: _signal(event["pid"], signal.SIGCONT))

    def _give_up(self) -> None:
        self.gave_up = True
        self._signal_all(signal.SIGKILL)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self.timers.append((time.monotonic() + seconds, act))

    def _signal_all(self, number: int) -> None:
        """Send a signal to every process of this start that lives, torchrun's children first."""
        for pid in self.pids:
            if pid not in self.codes:
                for process in (*_descendants(pid), pid):
                    _signal(process, number)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    """The living processes below a process, the deepest first."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, task.read_text().split())
    return [p for child in children for p in (*_descendants(child), child)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file; none if it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
