"""Is a run that was stopped, and continued, the run that was never stopped, bit for bit?"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

NUMBERS = ("step", "loss", "lr", "grad_norm")  # of a train line; the others depend on the clock and the machine


def resumes_bit_for_bit(
    overrides: list[str], train: Callable[..., tuple[int, str, str]], folder: Path, at: Iterable[int]
) -> Path:
    """Train once with a checkpoint of every step, then again from the checkpoints of the steps `at`; the numbers of
    all later updates and the files of the last checkpoint must be equal. Returns the first run's folder."""
    straight = folder / "straight"
    code, _, err = train(*overrides, f"run_dir={straight}", "checkpoint_every=1", "keep_last=99")
    assert code == 0, err
    last = max((straight / "checkpoints").glob("step_*")).name
    for step in sorted(at):
        stopped = stopped_at(straight, step, folder / f"stopped_{step}")
        code, out, err = train(*overrides, f"run_dir={stopped}", "checkpoint_every=1", "keep_last=99")
        assert code == 0, err
        assert f"from step {step:,}" in out
        assert lines(stopped) == lines(straight), f"stopped after update {step}"
        ours, theirs = (run / "checkpoints" / last for run in (stopped, straight))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes(), step
        for file in theirs.glob("*.pt"):
            assert_equal(*(torch.load(there / file.name, weights_only=True) for there in (ours, theirs)))
    return straight


def stopped_at(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as it was when the checkpoint of `step` had been written."""
    shutil.copytree(run, copy, symlinks=True)
    (copy / "summary.json").unlink()
    (copy / "checkpoints" / "latest").unlink()
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


def lines(run: Path) -> list[list[Any]]:
    """The numbers of every update, and the final loss."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[e.get(key) for key in NUMBERS] for e in events if e["event"] in ("train", "final")]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Equal plain data, and tensors equal in dtype and bits."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        assert ours == theirs
