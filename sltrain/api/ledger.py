"""The ledger of a study: every run and what it depended on, a JSON object a line, only ever appended to.

    {"event": "protocol", "name": "first", "common": [...], "reference": "dense", "trials": 4, ...}   the first line
    {"event": "candidate", "name": "dense", "overrides": [...], "tune": {...}, "equal": {...}, ...}   when it joins
    {"event": "run", "role": "tuning", "candidate": "dense", "trial": 1, "seed": 1, "loss": 5.1, ...}  when it has ended

Protocol and candidates of a ledger cannot change, or settings could be tried until one wins; candidates can join. A
line that a kill or a power cut tore is left out and written anew, a run's from its folder. A run that is in the ledger
is never made again, so its folder may go.
"""

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from sltrain.api.study import Candidate, Study, StudyRun
from sltrain.engine.metrics import to_strict_json
from sltrain.events import Event
from sltrain.reporting.rows import eval_bytes
from sltrain.reporting.study import Entry, Protocol, Results, counted, main_table, render
from sltrain.reporting.table import Table
from sltrain.runs.lock import RunLock
from sltrain.runs.run_folder import write_atomically
from sltrain.runs.run_record import LEDGER, STUDY_RUNS, read_run

PAGE = "study.md"
DIVERGED = "diverged"  # status of a run, see runs/run_record.py


@dataclass
class Ledger:
    """What the ledger in `folder` holds."""

    folder: Path
    protocol: dict[str, Any]
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[tuple[str, str, int, int], Entry] = field(default_factory=dict)  # by `Entry.key`, in order
    notes: list[str] = field(default_factory=list)
    lock: RunLock | None = None  # while this process writes to it

    @property
    def for_page(self) -> Protocol:
        """What the page needs besides the runs. Raises ValueError if not even the protocol was written."""
        if not self.protocol:
            raise ValueError(f"{self.folder / LEDGER} has no whole line: type the command of the study again")
        known = {item.name for item in fields(Protocol)} - {"candidates"}
        own = {key: value for key, value in self.protocol.items() if key in known}
        return Protocol(**own, candidates=self.candidates)

    def take(self, event: Mapping[str, Any]) -> None:
        """Add what a line says. Raises KeyError or TypeError for one that lacks something."""
        kind = event.get("event")
        if kind == "protocol":
            self.protocol = {key: value for key, value in event.items() if key != "event"}
        elif kind == "candidate":
            self.candidates[event["name"]] = {item.name: event[item.name] for item in fields(Candidate)}
        elif kind == "run":
            known = {item.name: event[item.name] for item in fields(Entry) if item.name in event}
            entry = Entry(**known | {"loss": math.inf if event["loss"] is None else event["loss"]})
            self.runs.setdefault(entry.key, entry)

    def append(self, event: Mapping[str, Any]) -> None:
        """Write a line to the disk. Raises OSError."""
        path = self.folder / LEDGER
        is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with open(path, "ab") as file:
            file.write(b"\n" * is_torn + to_strict_json(event).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def folder_of(self, run: StudyRun) -> Path:
        """Of one of its runs."""
        return self.folder / STUDY_RUNS / run.name

    def close(self) -> None:
        """Let other processes write to it."""
        if self.lock is not None:
            self.lock.release()

    def add(self, entry: Entry) -> None:
        """Append a run."""
        self.append({"event": "run", "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(entry)})
        self.runs[entry.key] = entry


def read_ledger(folder: Path) -> Ledger:
    """The ledger in this folder, without a protocol if a kill tore its only line. Raises ValueError if there is none,
    or it begins with something else."""
    path = folder / LEDGER
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{folder} holds no ledger of a study ({LEDGER}: {error.strerror}); name its folder") from None
    ledger, is_other = Ledger(folder, {}), False
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                event = dict(json.loads(line))
                is_other |= not ledger.protocol and event.get("event") != "protocol"
                ledger.take(event)
        except (ValueError, KeyError, TypeError, RecursionError):
            ledger.notes.append(f"{LEDGER}: line {number} is damaged and left out.")
    if is_other:
        raise ValueError(f"{path} does not begin with a protocol; it is damaged, or of something else")
    return ledger


def open_ledger(folder: Path, study: Study, writes: bool) -> Ledger:
    """The ledger of this study in `folder`. With `writes` it is begun if there is none, new candidates join, and no
    other process may write to it until `close`. Raises ValueError if it is that of another protocol, or a run in it was
    made from another configuration, or another process has it."""
    ledger, _ = _checked(folder, study)
    if writes:
        lock = RunLock(folder)
        ledger, new = _checked(folder, study)
        ledger.lock = lock
        for event in new:
            ledger.append(event)
    return ledger


def _checked(folder: Path, study: Study) -> tuple[Ledger, list[dict[str, Any]]]:
    """What is in the ledger, or would be in a new one, with the candidates of the study; and the lines that it lacks.
    Raises ValueError."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_dir={folder} is a file; name a folder for the study")
    ledger = read_ledger(folder) if (folder / LEDGER).exists() else Ledger(folder, {})
    protocol, new = {"name": study.name, **study.protocol()}, []
    if not ledger.protocol:  # a new one, or a kill tore its first line
        new.append({"event": "protocol", **protocol})
        ledger.protocol = protocol
    for key in {**protocol, **ledger.protocol}:
        before, now = ledger.protocol.get(key), protocol.get(key)
        if before != now:
            raise ValueError(
                f"run_dir={folder} holds a study with another protocol: {_change(key, before, now)}. Type what was"
                " typed then, or choose another run_dir"
            )
    for name, candidate in study.file.candidates.items():
        own = asdict(candidate)
        if name not in ledger.candidates:
            new.append({"event": "candidate", "name": name, **own})
        if (before := ledger.candidates.setdefault(name, own)) != own:
            raise ValueError(
                f"run_dir={folder} holds a study with another candidate {name}: it was {before}, is now {own}. Give the"
                " new one another name, or choose another run_dir"
            )
    _check_configs(ledger, study)
    return ledger, new


def _change(key: str, before: Any, now: Any) -> str:
    """What is another value, in words; of the common overrides those that differ."""
    if key != "common" or before is None or set(before) == set(now):
        return f"{key} was {before!r}, is now {now!r}"
    gone, new = ([text for text in one if text not in other] for one, other in ((before, now), (now, before)))
    parts = [f"{what} {' '.join(texts)}" for what, texts in (("had", gone), ("now has", new)) if texts]
    return f"{key} {', '.join(parts)}"


def _check_configs(ledger: Ledger, study: Study) -> None:
    """Refuse (ValueError) runs that today's version would make from other values. A key that only one version has
    changes nothing."""
    trials = dict.fromkeys(study.file.candidates, range(1, study.file.trials + 1))
    for run in itertools.chain(study.screening_runs(), study.tuning_runs(trials)):
        entry = ledger.runs.get(run.key)
        if entry is None:
            continue
        for key, value in run.config.items():
            if entry.config.get(key, value) != value:
                raise ValueError(
                    f"run_dir={ledger.folder} holds {run.name} made with {key}={entry.config[key]}, and today the same"
                    f" overrides mean {key}={value}. Take the version that made it ({entry.code}), or choose"
                    " another run_dir"
                )


def entry_of(run: StudyRun, folder: Path, seconds: float, machine: str) -> Entry:
    """The line of the run in this folder, whose process has ended after `seconds`; `machine` is what it was made on."""
    record = read_run(folder)
    final: Event = record.final or {}
    last: Event = record.last or {}
    loss = final.get("loss", math.inf)
    return Entry(
        role=run.role,
        candidate=run.candidate,
        trial=run.trial,
        setting=run.setting,
        seed=run.seed,
        loss=loss if record.status != DIVERGED and math.isfinite(loss) else math.inf,
        updates=last.get("step", 0),
        tokens=last.get("tokens"),
        num_parameters=final.get("num_parameters", {}).get("total"),
        flops_per_token=_flops_per_token(record.train),
        seconds_per_update=_seconds_per_update(record.train),
        seconds=round(max(seconds, last.get("wall_seconds", 0.0)), 1),
        evals=[[event["step"], event["loss"]] for event in record.evals if math.isfinite(event["loss"])],
        eval_tokens=final.get("eval_tokens"),
        eval_bytes=eval_bytes(final),
        config=run.config,
        code=code_version(),
        versions={"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
        machine=machine,
    )


def _flops_per_token(train: list[Event]) -> float | None:
    """On average over the tokens of the run, as a method may change the model on the way."""
    tokens = [end - begin for begin, end in pairwise([0, *(event["tokens"] for event in train)])]
    known = [(flops, count) for event, count in zip(train, tokens, strict=True) if (flops := _flops_at(event))]
    return float(round(statistics.fmean(*zip(*known, strict=True)))) if known else None


def _flops_at(event: Event) -> float | None:
    """Of a token at a train line: arithmetic a second over tokens a second, of one process on one device."""
    return round(event["tflops"] * 1e12 / event["tokens_per_second"]) if event.get("tflops") else None


def _seconds_per_update(train: list[Event]) -> float | None:
    """The median over train lines but the first, outside evaluation and saving. Where a method changes the model on the
    way, and so the FLOPs a token, the mean of the medians, by updates."""
    parts: dict[float | None, list[tuple[float, int]]] = {}
    for before, after in pairwise(train):
        if after.get("tokens_per_second") and after["step"] > before["step"]:
            updates = after["step"] - before["step"]
            seconds = (after["tokens"] - before["tokens"]) / after["tokens_per_second"] / updates
            parts.setdefault(_flops_at(after), []).append((seconds, updates))
    medians = [statistics.median(seconds for seconds, _ in part) for part in parts.values()]
    weights = [sum(updates for _, updates in part) for part in parts.values()]
    return round(statistics.fmean(medians, weights), 6) if parts else None


def draw_study(ledger: Ledger, output: Path, command: str) -> Path:
    """Write the page of a study, finished or not, and its picture, and return the path of the page. Raises ValueError
    if it cannot be written."""
    from sltrain.reporting.study_figure import draw_ratios  # with matplotlib

    page, results = output / PAGE, Results(ledger.for_page, list(ledger.runs.values()))
    picture = draw_ratios(results)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            write_atomically(output / picture.file_name, picture.png)
        write_atomically(page, render(results, ledger.notes, command, picture))
    except OSError as error:
        raise ValueError(f"{page} cannot be written ({error.strerror}); name a folder with --output DIR") from error
    return page


def study_table(ledger: Ledger) -> Table | None:
    """The table on top of the page; None until the reference is reported."""
    results = Results(ledger.for_page, list(ledger.runs.values()))
    return main_table(results) if ledger.for_page.reference in results.runs else None


def code_version() -> str:
    """The commit of a checkout, with -dirty if files were changed; of an installed package its version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    try:
        return version("sltrain")
    except PackageNotFoundError:  # files without a history, not installed
        return "unknown"


@cache
def machine_name(device: str, threads: str | None = None) -> str:
    """The device that device=auto, cpu or cuda means here: the card, or the CPU and the threads of a run, by default
    those that torch takes."""
    import torch

    from sltrain.benchmarks.base import cpu_name
    from sltrain.engine.distributed import pick_device

    if pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {counted(int(threads or torch.get_num_threads()), 'thread')}"
