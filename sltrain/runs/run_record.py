"""What a run folder says about its run, read from outside: nothing is written and no run is disturbed.

A run may be writing to the folder right now, may have died in the middle of a line, or may have been copied in part
from another machine. So what cannot be read becomes a note, and the rest still counts.

The status is the first of these that applies:

    finished      summary.json exists
    running       a live process of this machine holds `.lock`
    interrupted, diverged, out of memory, data lost
                  the last line of metrics.jsonl is a `stopped` line with this outcome
    not started   metrics.jsonl has no line, and `.lock` names no process that ever held it
    running       metrics.jsonl (config.yaml before it) was written within ten minutes, and `.lock` does not contradict:
                  locks are not visible across machines, so a free one counts only if its owner ran on this one
    crashed       nothing says how the run ended
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sltrain.events import DIVERGING, NUMBERS, Event
from sltrain.runs.run_folder import OURS, RunFolder, read_config

RECENT_SECONDS = 600.0
LEDGER, STUDY_RUNS = "ledger.jsonl", "runs"  # of a study, and the folder of its runs beside it


@dataclass
class RunRecord:
    """One run as its folder describes it. A loss that is not finite is NaN."""

    path: Path
    config: dict[str, Any]  # config.yaml; empty if it cannot be read
    events: list[Event]  # of every kind, in order
    train: list[Event]
    evals: list[Event]
    final: Event | None
    last: Event | None  # the newest event of any kind
    status: str
    tokenizer_hash: str | None  # SHA-256 of tokenizer.json
    notes: list[str]  # what is missing or damaged


def find_runs(paths: Iterable[Path], studies: list[Path] | None = None) -> list[Path]:
    """The run folders among `paths` and below them, each once, in the order of paths and names. Run folders and hidden
    folders are not searched; symbolic links are followed. Studies below a path are not searched either, and appended to
    `studies`: their runs are for the study's page."""
    seen, below = set[str](), [] if studies is None else studies
    return [run for path in paths for run in _walk(Path(path), seen, below, is_named=True)]


def _walk(folder: Path, seen: set[str], studies: list[Path], is_named: bool = False) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen or not os.path.isdir(real):
        return
    seen.add(real)
    if is_run(folder):
        yield folder
        return
    if not is_named and (folder / LEDGER).is_file():
        studies += [folder] * (folder / STUDY_RUNS).is_dir()  # a ledger may be kept without its runs
        return
    with contextlib.suppress(OSError):  # no permission to list it
        for entry in sorted(folder.iterdir()):
            if not entry.name.startswith("."):
                yield from _walk(entry, seen, studies)


def is_run(folder: Path) -> bool:
    """Whether config.yaml is one of ours or, if it cannot be read, metrics.jsonl has a line of ours."""
    run = RunFolder(folder)
    try:
        return read_config(run.config_file).keys() >= OURS
    except (OSError, ValueError):
        return bool(_read_events(run.metrics_file, [])[0])


def read_run(path: Path) -> RunRecord:
    """Everything that the folder `path` says about its run; `notes` names what is missing or damaged."""
    run, notes = RunFolder(Path(path)), list[str]()
    config: dict[str, Any] = {}
    try:
        config = read_config(run.config_file)
    except OSError as error:
        notes.append(f"config.yaml cannot be read ({error.strerror})")
    except ValueError:
        notes.append("config.yaml is damaged")
    events, num_lines = _read_events(run.metrics_file, notes)
    final = next((event for event in reversed(events) if event["event"] == "final"), None)
    try:
        final = _parse(run.summary_file.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError):
        notes.append("summary.json is damaged; the final numbers are those of metrics.jsonl")
    tokenizer_hash = None
    try:
        tokenizer_hash = hashlib.sha256(run.tokenizer_file.read_bytes()).hexdigest()
    except OSError as error:
        if num_lines:
            notes.append(f"tokenizer.json cannot be read ({error.strerror}): its perplexity compares with no other")
    return RunRecord(
        path=run.path,
        config=config,
        events=events,
        train=[event for event in events if event["event"] == "train"],
        evals=[event for event in events if event["event"] == "eval"],
        final=final,
        last=events[-1] if events else final,
        status=_status(run, events, num_lines, notes),
        tokenizer_hash=tokenizer_hash,
        notes=notes,
    )


def _read_events(path: Path, notes: list[str]) -> tuple[list[Event], int]:
    """The events of metrics.jsonl, and how many lines it has, damaged ones included."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read ({error.strerror})")
        return [], 0
    events, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                events.append(_parse(line))
            except (ValueError, RecursionError):
                damaged.append(str(number))
    if len(damaged) == 1:
        notes.append(f"metrics.jsonl: line {damaged[0]} is damaged and skipped")
    elif damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        notes.append(f"metrics.jsonl: lines {', '.join(damaged[:3])}{more} are damaged and skipped")
    return events, len(events) + len(damaged)


def _parse(line: bytes) -> Event:
    """One event. Raises ValueError (RecursionError for absurd nesting) if it is none of ours."""
    event = json.loads(line)
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("no event")
    if not isinstance(event.get("step"), int) or not _is_number(event["step"]):
        raise ValueError("no step")
    for key in DIVERGING:
        if key in event and event[key] is None:
            event[key] = math.nan
    for key in (*DIVERGING, *NUMBERS):
        value = event.get(key)
        is_nan = isinstance(value, float) and math.isnan(value) and key in DIVERGING
        if not (value is None or is_nan or _is_number(value)):
            raise ValueError(f"{key} is no number")
    return cast(Event, event)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _status(run: RunFolder, events: list[Event], num_lines: int, notes: list[str]) -> str:
    if run.is_finished:
        return "finished"
    is_held, owner = _probe_lock(run.path / ".lock")
    if is_held:
        return "running"
    outcome = events[-1].get("outcome") if events and events[-1]["event"] == "stopped" else None
    if isinstance(outcome, str) and outcome:
        return outcome
    if not num_lines and owner is None:
        return "not started"
    newest = run.metrics_file if num_lines else run.config_file
    with contextlib.suppress(OSError):
        if owner != socket.gethostname() and time.time() - newest.stat().st_mtime < RECENT_SECONDS:
            notes.append(f"assumed to be running: {newest.name} is minutes old, and its lock is not visible from here")
            return "running"
    return "crashed"


def _probe_lock(path: Path) -> tuple[bool, str | None]:
    """Whether a live process holds the lock; and the machine of its last owner, if a free lock can be trusted there.
    The only way to know is to try: a shared lock is held for an instant, on a file opened for reading."""
    try:
        with open(path, errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            return False, file.readline().strip().rpartition(" on ")[2] or None
    except BlockingIOError:
        return True, None
    except OSError:  # no lock file, or a file system without locks
        return False, None
