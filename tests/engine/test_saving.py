"""Saves in the background: they hold their step, count once they are on the disk, and fail aloud, on every rank."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_equal
from safetensors.torch import load_file
from torch import nn

from sltrain.engine import sealed_folder
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import CheckpointError, Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.saving import Save, Saves
from sltrain.optim.named_state import OptimizerState

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is closed, a save gets to its first file and no further."""
    opened, real = threading.Event(), sealed_folder._seal

    def seal(path: Path) -> dict[str, Any]:
        assert opened.wait(60)
        return real(path)

    monkeypatch.setattr(sealed_folder, "_seal", seal)
    yield opened
    opened.set()


class Training:
    """A small model and its optimizer, in whose every update all values change."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(6, 4)
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=0.1)

    def update(self, times: int = 1) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            self.model(torch.randn(5, 6)).square().sum().backward()
            self.optimizer.step()

    def contents(self, step: int) -> Contents:
        return Contents.of(step, self.model, {"optimizer": OptimizerState(self.optimizer, [])}, {})


def begin(saves: Saves, training: Training, step: int, **how: bool) -> None:
    saves.begin(Save(step, 10 * step, 20 * step), training.contents(step), **how)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_later_is_the_step_it_began_at(tmp_path: Path, gate: threading.Event) -> None:
    training, saves = Training(), Saves(Checkpointer(tmp_path, 2), ONE, in_background=True)
    training.update(2)
    there = deepcopy((training.model.state_dict(), training.optimizer.state_dict()["state"]))
    begin(saves, training, 2)
    training.update(3)
    assert saves.written() is None and saves.saved_step == -1 and saves.begun_step == 2
    gate.set()
    save = saves.finish()
    assert save is not None and save.path == tmp_path / "checkpoints/step_00000002" and saves.saved_step == 2
    assert (save.step, save.tokens, save.positions) == (2, 20, 40) and 0 < save.blocked_seconds < save.seconds
    assert_equal(load_file(save.path / "model.safetensors"), dict(there[0]))
    state = torch.load(save.path / "optimizer.pt", weights_only=True)["state"]
    assert_equal([state[name] for name in ("weight", "bias")], [there[1][0], there[1][1]])
    assert saves.finish() is None and saves.written() is None, "it is told once"


def test_only_its_name_makes_it_a_checkpoint(tmp_path: Path, gate: threading.Event) -> None:
    """Until then the one before is the latest, and nothing is deleted."""
    training, keeper = Training(), Checkpointer(tmp_path, 1)
    gate.set()
    first = keeper.write(training.contents(1))
    gate.clear()
    saves = Saves(keeper, ONE, in_background=True, step=1)
    begin(saves, training, 2)
    while not (tmp_path / "checkpoints/step_00000002.tmp").exists():
        pass
    assert keeper.find_latest() == first and (keeper.folder / "latest").resolve() == first.resolve()
    assert names(keeper.folder) == {"step_00000001", "step_00000002.tmp", "latest"} and saves.saved_step == 1
    gate.set()
    assert saves.close() is not None
    assert names(keeper.folder) == {"step_00000002", "latest"} and saves.saved_step == 2


def test_memory_is_found_once_and_not_while_it_is_read(tmp_path: Path, gate: threading.Event) -> None:
    training, saves = Training(), Saves(Checkpointer(tmp_path, 2), ONE, in_background=True)
    training.update()
    saves.reserve(training.contents(1))
    held = saves.host.nbytes
    assert held == 4 * (3 * 28 + 2)
    begin(saves, training, 1)
    there = deepcopy(training.model.state_dict())
    training.update()
    saves.reserve(training.contents(2))
    gate.set()
    save = saves.finish()
    assert save is not None and save.path is not None and saves.host.nbytes == held
    assert_equal(load_file(save.path / "model.safetensors"), dict(there))
    at_once = Saves(Checkpointer(tmp_path / "other", 2), ONE)
    at_once.reserve(training.contents(2))
    begin(at_once, training, 2)
    assert at_once.host.nbytes == 0, "what is written at once is not copied"
    save = at_once.written()
    assert save is not None and save.blocked_seconds == save.seconds > 0


def full_disk(path: Path) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_is_raised_once_and_never_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    training, keeper = Training(), Checkpointer(tmp_path, 1)
    first = keeper.write(training.contents(1))
    with monkeypatch.context() as patch:
        patch.setattr(sealed_folder, "_seal", full_disk)
        saves = Saves(keeper, ONE, in_background=True, step=1)
        begin(saves, training, 2)
        while not saves.has_failed:
            assert saves.written() is None
        with pytest.raises(CheckpointError, match="of step 2 could not be written .*No space left on device"):
            saves.finish()
        assert not saves.has_failed and saves.finish() is None and saves.saved_step == 1
        assert keeper.find_latest() == first and names(keeper.folder) == {"step_00000001", "latest"}
        begin(saves, training, 3)  # one that nobody waits for any more is a warning
        assert saves.close() is None and saves.saved_step == 1
    assert len(lines) == 1 and "of step 3 could not be written" in lines[0]
    saves = Saves(keeper, ONE, in_background=True, step=1)
    begin(saves, training, 4, in_background=False)
    assert saves.host.nbytes == 0 and saves.written() is not None and saves.saved_step == 4


def test_every_rank_hears_of_a_failure_and_of_a_success(
    on_two_ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(ranks: Ranks) -> list[Any]:
        saves = Saves(Checkpointer(tmp_path, 1), ranks, in_background=True)
        training = Training()
        begin(saves, training, 1)
        first = saves.finish()
        seen: list[Any] = [saves.saved_step, first is None or first.path is None]
        with monkeypatch.context() as patch:
            patch.setattr(sealed_folder, "_seal", full_disk)
            begin(saves, training, 2)
            try:
                saves.finish()
            except ValueError as error:
                seen.append((type(error).__name__, "No space left" in str(error), saves.saved_step))
        begin(saves, training, 3)
        saves.finish()
        saves.close()
        return [*seen, saves.saved_step]

    main, other = on_two_ranks(work)
    assert main == [1, False, ("CheckpointError", True, 1), 3]
    assert other == [1, True, ("ToldByAnotherRank", True, 1), 3]
