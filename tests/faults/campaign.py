"""Runs a schedule: starts the run, lets a fault come, starts it again, until it is finished; then the verdict."""

import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .schedule import KEEP_LAST, MAX_STEPS, Fault, Schedule
from .starts import STARTERS, Ended, Launch
from .verdict import (
    Start,
    Update,
    history_of,
    newest,
    problems_of_documents,
    problems_of_folder,
    problems_of_starts,
    segments_of,
)
from .world import FIRST_DOCUMENT, NUM_DOCUMENTS, RECIPES, make_world

MOST_STARTS = 12
Segments = tuple[tuple[int, int], ...]


@dataclass
class Record:
    """What became of one schedule."""

    schedule: Schedule
    faults: list[str]  # in words, and where each came
    problems: list[str]
    useful_updates: int
    begun_updates: int
    starts: int
    seconds: float
    cpu_seconds: float  # of all its processes
    useful_cpu_seconds: float  # of the undisturbed run's
    kept: str | None = None  # the folder of a run that lost something

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Undisturbed:
    """A run that nothing disturbed."""

    folder: Path
    history: dict[int, Update]
    cpu_seconds: float


@dataclass
class Campaign:
    """Runs schedules in a folder of its own. `starter`: forked or commands, see starts.py."""

    folder: Path
    starter: str = "forked"
    undisturbed: dict[Any, Undisturbed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = self.folder / "text"
        self.overrides = make_world(self.text)
        self.num_folders = 0

    def run(self, schedule: Schedule) -> Record:
        """Run a schedule to its end and compare."""
        begin = time.monotonic()
        folder = self._new_folder(f"seed_{schedule.seed}")
        starts, told = self._disturb(schedule, folder)
        problems = problems_of_starts(starts, in_background="checkpoint_async=true" in RECIPES[schedule.recipe])
        history = history_of(starts)
        segments = segments_of(history)
        seconds = time.monotonic() - begin
        useful_cpu = 0.0
        if segments and segments[-1][1] == MAX_STEPS:
            corrupt = tuple(step for step in sorted(history) if history[step].skipped)
            undisturbed = self.undisturbed_run(schedule.recipe, segments, corrupt)
            useful_cpu = undisturbed.cpu_seconds
            one_a_row = "padding=truncate_pad" in RECIPES[schedule.recipe]
            problems += problems_of_documents(history, undisturbed.history, one_a_row)
            problems += problems_of_folder(folder / "run", undisturbed.folder)
        else:
            problems.append(f"not finished after {len(starts)} starts: {starts[-1].ended.said[-500:]!r}")
        begun = sum(len(start.begun) for start in starts)
        if not problems:
            shutil.rmtree(folder)
        kept = str(folder) if problems else None
        cpu = sum(start.ended.cpu_seconds for start in starts)
        return Record(schedule, told, problems, len(history), begun, len(starts), seconds, cpu, useful_cpu, kept)

    def undisturbed_run(self, recipe: str, segments: Segments, corrupt: tuple[int, ...] = ()) -> Undisturbed:
        """The run of a recipe with these numbers of processes until these updates, and corrupt gradients in these
        updates; made once."""
        key = (recipe, segments, corrupt)
        if key not in self.undisturbed:
            folder = self._new_folder(f"undisturbed_{recipe}")
            starts = []
            first = 1
            for processes, last in segments:
                faults = [
                    Fault("gradient", "nan", step, "update", "backward") for step in corrupt if first <= step <= last
                ]
                if last < MAX_STEPS:
                    faults.append(Fault("signal", "signal", last, "update", "after", detail="SIGTERM"))
                ended = self._start(recipe, processes, list(enumerate(faults)), folder)
                starts.append(Start(processes, ended, ended_by=faults[-1] if last < MAX_STEPS else None))
                first = last + 1
            problems = problems_of_starts(starts)
            if problems or not (folder / "run" / "summary.json").exists():
                raise RuntimeError(f"the undisturbed run {key} failed: {problems} {starts[-1].ended.said[-2000:]}")
            cpu_seconds = sum(start.ended.cpu_seconds for start in starts)
            self.undisturbed[key] = Undisturbed(folder / "run", history_of(starts), cpu_seconds)
        return self.undisturbed[key]

    def count_operations(self, recipe: str) -> tuple[int, list[list[str]]]:
        """File operations of an undisturbed run of one process: of all, and those of each save."""
        ended = self._start(recipe, 1, [], self._new_folder("counted"))
        journal = ended.journals[0]
        total = next(event["total"] for event in journal if "total" in event)
        return total, [event["operations"] for event in journal if "save" in event]

    # ---- starts

    def _disturb(self, schedule: Schedule, folder: Path) -> tuple[list[Start], list[str]]:
        """Start the run until it is finished, with the faults in their order. Returns the starts, and of each fault
        where it came."""
        todo, processes, starts = list(enumerate(schedule.faults)), schedule.processes, list[Start]()
        told = {number: f"{fault}: not reached" for number, fault in todo}
        while not (folder / "run" / "summary.json").exists() and len(starts) < MOST_STARTS:
            last = next((i for i, (_, fault) in enumerate(todo) if fault.ends_the_start), len(todo) - 1)
            armed = todo[: last + 1]
            ended = self._start(schedule.recipe, processes, armed, folder)
            start = Start(processes, ended)
            starts.append(start)
            for event in ended.fired:
                fault = schedule.faults[event["fired"]]
                told[event["fired"]] = f"{fault} -> start {len(starts)}, {_place(event)}"
                todo = [item for item in todo if item[0] != event["fired"]]
                if fault.ends_the_start:
                    start.ended_by = fault
                if fault.then is not None:
                    start.damaged = self._at_rest(
                        fault, folder / "run", random.Random(f"{schedule.seed} {event['fired']}")
                    )
                    processes = fault.detail if fault.then == "processes" else processes
            if start.ended_by is None:
                break  # finished, or it failed on its own
        return starts, list(told.values())

    def _start(self, recipe: str, processes: int, faults: list[tuple[int, Fault]], folder: Path) -> Ended:
        of_ranks: list[list[dict[str, Any]]] = [[] for _ in range(processes)]
        for number, fault in faults:
            order = {**asdict(fault), "id": number}
            if fault.trigger == "bytes":
                order["bytes"] = int(fault.at * self._largest_file(recipe, processes))
            of_ranks[fault.rank % processes].append(order)
        launch = Launch(
            [*self.overrides, *RECIPES[recipe]],
            processes,
            of_ranks,
            folder / "run",
            self.text,
            folder / f"start_{len(list(folder.glob('start_*'))) + 1}",
            (FIRST_DOCUMENT, FIRST_DOCUMENT + NUM_DOCUMENTS - 1),
        )
        return STARTERS[self.starter](launch)

    def _largest_file(self, recipe: str, processes: int) -> int:
        """Bytes of the largest file of a checkpoint."""
        run = self.undisturbed_run(recipe, ((processes, MAX_STEPS),)).folder
        return max(path.stat().st_size for path in newest(run).iterdir())

    def _at_rest(self, fault: Fault, run: Path, rng: random.Random) -> bool:
        """Do to the folder of a run that is down what `fault.then` says; return whether a checkpoint was damaged."""
        checkpoints = sorted((run / "checkpoints").glob("step_*[0-9]"))
        if fault.then == "leftover":
            leave_remains(run, checkpoints)
        elif fault.then in ("truncated", "flipped") and len(checkpoints) >= KEEP_LAST:
            file = rng.choice(sorted(checkpoints[-1].iterdir()))
            damage(file, fault.then, fault.detail)
            return True
        return False

    def _new_folder(self, name: str) -> Path:
        self.num_folders += 1
        folder = self.folder / f"{self.num_folders:03d}_{name}"
        folder.mkdir()
        return folder


def damage(file: Path, how: str, share: float) -> None:
    """Cut a file off at a share of its length, or flip a bit there."""
    content = bytearray(file.read_bytes())
    at = int(share * (len(content) - 1))
    if how == "truncated":
        content = content[:at]
    else:
        content[at] ^= 1 << (at % 8)
    file.write_bytes(content)


def leave_remains(run: Path, checkpoints: list[Path]) -> None:
    """What starts that were killed may leave in a folder."""
    written = ["config.yaml", "metrics.jsonl", "summary.json"]
    if not checkpoints:  # afterwards the tokenizer stays as it is
        written.append("tokenizer.json")
    for name in written:
        (run / f"{name}.tmp").write_bytes(b'{"half": ')
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    for name in ("step_00000004.tmp", "step_00000099.tmp"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / "latest.tmp").unlink(missing_ok=True)
    (folder / "latest.tmp").symlink_to("step_00000099")
    for path in checkpoints:  # the order of the clock is not that of the steps
        os.utime(path, (0, 0))


def _place(event: dict[str, Any]) -> str:
    if event["operation"] is not None:
        return f"at {event['operation']}"
    if event["save"] is not None:
        return f"in the save of update {event['save']}"
    return f"update {event['step']}"


def append_line(path: Path, record: Record) -> None:
    """Add a record to a file of JSON lines, with one write."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(record.as_json()).encode() + b"\n")
