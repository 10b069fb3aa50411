"""Was anything lost? A disturbed run against one that nothing disturbed: files, log, documents, what each start said.

The undisturbed run is stopped cleanly where the disturbed one went on with another number of processes, and has the
same corrupt gradients: sums over another number of processes, and an update that is skipped, are no losses. Everything
else must be equal bit for bit.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schedule import CHECKPOINT_EVERY, MAX_STEPS, Fault
from .starts import Ended, read_lines
from .world import EPOCH, NUM_DOCUMENTS

COMPARED = {
    "train": ("step", "tokens", "positions", "loss", "lr", "grad_norm", "num_skipped_updates", "num_skipped_tensors"),
    "eval": ("step", "tokens", "loss", "perplexity", "eval_tokens"),
    "final": ("step", "tokens", "loss", "perplexity", "eval_tokens"),
}


@dataclass
class Start:
    """One start of a run: on how many processes, which fault ended it, and how."""

    processes: int
    ended: Ended
    ended_by: Fault | None = None
    damaged: bool = False  # the newest checkpoint was damaged afterwards

    @property
    def begun(self) -> list[int]:
        """The updates that were begun on rank 0, in order."""
        return [event["begin"] for event in self.ended.journals[0] if "begin" in event]

    @property
    def done(self) -> list[int]:
        """The updates that were finished on rank 0, in order."""
        return [event["end"] for event in self.ended.journals[0] if "end" in event]


@dataclass
class Update:
    """One update of the history that the run's weights have."""

    processes: int
    skipped: bool
    rows: list[Any] = field(default_factory=list)  # of all ranks: [checksum, document tokens] of each


def history_of(starts: list[Start]) -> dict[int, Update]:
    """Step -> the attempt at it that counts: a start makes void what earlier ones did from its first update on."""
    history: dict[int, Update] = {}
    for start in starts:
        if not start.begun:
            continue
        history = {step: update for step, update in history.items() if step < start.begun[0]}
        for journal in start.ended.journals:
            for event in (event for event in journal if "end" in event):
                update = history.setdefault(event["end"], Update(start.processes, event["skipped"]))
                update.rows += event["rows"]
    return history


def segments_of(history: dict[int, Update]) -> tuple[tuple[int, int], ...]:
    """(number of processes, last update) of each stretch of updates that were made by the same number."""
    segments: list[tuple[int, int]] = []
    for step in sorted(history):
        processes = history[step].processes
        if segments and segments[-1][0] == processes:
            segments.pop()
        segments.append((processes, step))
    return tuple(segments)


def problems_of_starts(starts: list[Start], in_background: bool = False) -> list[str]:
    """What is wrong with the way in which starts ended and went on; `in_background`: checkpoints are written there."""
    problems = []
    for number, start in enumerate(starts, 1):
        problems += [f"start {number}: {problem}" for problem in _problems_of_end(start)]
    done = 0
    for number, (before, after) in enumerate(zip(starts, starts[1:], strict=False), 2):
        done = max(before.done, default=done)
        if not after.begun:
            continue
        lost, allowed = done - (after.begun[0] - 1), _may_lose(before, in_background)
        if lost > allowed:
            problems.append(f"start {number}: {lost} updates are done again after {before.ended_by}; {allowed} may be")
        if lost < 0:
            problems.append(f"start {number}: it begins with update {after.begun[0]}, but {done} were done")
    return problems


def _may_lose(start: Start, in_background: bool) -> int:
    """How many updates may be done again after a start."""
    if start.ended_by is not None and start.ended_by.effect in ("signal", "read_dead"):
        return 0
    return CHECKPOINT_EVERY * (1 + start.damaged + in_background)  # training goes on while one is written


def _problems_of_end(start: Start) -> list[str]:
    """What a fault that ends a start must leave: the code that README promises, and a line instead of a traceback."""
    said, codes = start.ended.said, start.ended.codes
    problems = ["it did not end by itself"] if start.ended.gave_up else []
    fault = start.ended_by
    effect = None if fault is None else fault.effect
    abrupt = effect in ("kill", "node", "hang", "torn")
    frames = [line.strip() for line in said.splitlines() if 'File "' in line]
    ours = [frame for frame in frames if "/sltrain/" in frame]  # torchrun prints a traceback of its own
    if ours and not (abrupt and start.processes > 1):  # the others lose their peer
        problems.append(f"a traceback through {ours[-1]}: {said[-300:]!r}")
    if effect == "hang" and start.processes > 1 and "hang_timeout=" not in said:
        problems.append(f"no line says who hung: {said[-300:]!r}")
    if start.processes > 1:  # of several, and of torchrun, the codes are those of processes that were ended
        return problems
    expected = {None: {0}, "signal": {3, 130}, "full": {2}, "quota": {2}, "read_dead": {2, 4}}.get(effect)
    if expected is not None and not expected & set(codes) and not (effect == "signal" and codes == [0]):
        problems.append(f"exit code {codes[0]} after {effect}: {said[-300:]!r}")
    line = {"full": "could not be written", "quota": "could not be written", "read_dead": "train."}.get(effect or "")
    if line is not None and line not in said:
        problems.append(f"no line says what happened: {said[-300:]!r}")
    return problems


def problems_of_documents(history: dict[int, Update], undisturbed: dict[int, Update], one_a_row: bool) -> list[str]:
    """Whether each update read the rows of the undisturbed run, and each document came once an epoch."""
    if sorted(history) != list(range(1, MAX_STEPS + 1)):
        return [f"updates {sorted(history)} are in the weights, not 1 to {MAX_STEPS}"]
    problems = [
        f"update {step} read other rows"
        for step in history
        if sorted(history[step].rows) != sorted(undisturbed[step].rows)
    ]
    if one_a_row:
        for first in range(1, MAX_STEPS - EPOCH + 2, EPOCH):
            seen = Counter(
                token for step in range(first, first + EPOCH) for _, tokens in history[step].rows for token in tokens
            )
            if len(seen) != NUM_DOCUMENTS or set(seen.values()) != {1}:
                problems.append(f"updates {first} to {first + EPOCH - 1} read {len(seen)} documents, {seen}")
    return problems


def problems_of_folder(run: Path, undisturbed: Path) -> list[str]:
    """Where a finished run folder differs from the undisturbed run's."""
    if not (run / "summary.json").exists():
        return ["the run is not finished"]
    problems = [f"{path.relative_to(run)} is left" for path in run.rglob("*") if path.suffix in (".tmp", ".old")]
    problems += _problems_of_log(run, undisturbed)
    ours, theirs = newest(run), newest(undisturbed)
    if ours.name != theirs.name or (names := _names(ours)) != _names(theirs):
        return [*problems, f"the last checkpoint is {ours.name} {_names(ours)}, not {theirs.name} {_names(theirs)}"]
    for name in names:
        if name != "manifest.json" and not _same(ours / name, theirs / name):
            problems.append(f"{name} of {ours.name} differs{_by_how_much(ours / name, theirs / name)}")
    return problems


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    return max((run / "checkpoints").glob("step_*[0-9]"))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _problems_of_log(run: Path, undisturbed: Path) -> list[str]:
    ours, theirs = (_numbers(folder / "metrics.jsonl") for folder in (run, undisturbed))
    problems = []
    if not (run / "metrics.jsonl").read_bytes().endswith(b"\n"):
        problems.append("metrics.jsonl ends in the middle of a line")
    for event in COMPARED:
        mine, other = ([line for name, line in lines if name == event] for lines in (ours, theirs))
        if mine != other:
            steps = [line["step"] for line in mine]
            different = [line["step"] for line in mine if line not in other]
            problems.append(f"metrics.jsonl has other {event} lines: of steps {steps}; numbers differ in {different}")
    saves = Counter(line["step"] for name, line in ours if name == "checkpoint")
    problems += [f"metrics.jsonl tells {count} saves of step {step}" for step, count in saves.items() if count > 1]
    if json.loads((run / "summary.json").read_text()) != read_lines(run / "metrics.jsonl")[-1]:
        problems.append("summary.json is not the last line of metrics.jsonl")
    return problems


def _numbers(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(event, what does not depend on the clock) of each line."""
    lines = read_lines(path)
    return [(line["event"], {key: line.get(key) for key in COMPARED.get(line["event"], ("step",))}) for line in lines]


def _same(ours: Path, theirs: Path) -> bool:
    if ours.suffix == ".pt":
        import torch

        return equal(*(torch.load(path, weights_only=True) for path in (ours, theirs)))
    if ours.name == "state.json":
        states = [json.loads(path.read_text()) for path in (ours, theirs)]
        for state in states:
            del state["progress"]["wall_seconds"]
        return equal(*states)
    return ours.read_bytes() == theirs.read_bytes()


def equal(ours: Any, theirs: Any) -> bool:
    """Equal plain data; tensors equal in dtype and bits."""
    import torch

    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and _bits(ours) == _bits(theirs)
    return bool(ours == theirs)


def _bits(tensor: Any) -> bytes:
    import torch

    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def _by_how_much(ours: Path, theirs: Path) -> str:
    if ours.suffix != ".safetensors":
        return ""
    from safetensors.torch import load_file

    a, b = load_file(ours), load_file(theirs)
    if a.keys() != b.keys():
        return " in its names"
    return f" by up to {max(float((a[name].double() - b[name].double()).abs().max()) for name in a):.1e}"
