"""A checkpoint to which every process writes its share holds what a gathered one does, for any number of readers."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_equal
from torch import Tensor, nn

from sltrain.engine import sealed_folder, sharded_files
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import CheckpointError, Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.ema import Average
from sltrain.engine.memory import bytes_of
from sltrain.engine.saving import Save, Saves
from sltrain.engine.sharded import Settings, Sharded
from sltrain.engine.sharded_files import ShardedFiles, _Writer, read_all
from sltrain.engine.snapshot import HostCopy
from sltrain.engine.strategy import Single, Strategy
from sltrain.optim.named_state import OptimizerState

CPU = torch.device("cpu")
ALONE = Single(Ranks(0, 1, CPU))
SHARES = Settings(saves_shares=True)
OnRanks = Callable[..., list[Any]]


class Model(nn.Module):
    """Two units and a head; seven and five rows, which no number of ranks divides, one, and a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units = nn.ModuleList([nn.Linear(4, 7), nn.Linear(7, 5)])
        self.head = nn.Linear(5, 1, dtype=torch.bfloat16)
        self.register_buffer("indices", torch.arange(9).to(torch.uint16))


class Training:
    """A model on the ranks of a strategy, with an optimizer and averages."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.model = strategy, Model()
        strategy.shard(self.model, list(self.model.units))
        named = list(strategy.named_parameters(self.model))
        self.optimizer = torch.optim.AdamW(named, lr=0.1)
        self.average = Average(self.model, 0.9, named)
        self.objects = {"optimizer": OptimizerState(self.optimizer, []), "action/ema": self.average}

    def update(self) -> None:
        """A gradient that depends on the place of a value in the whole tensor."""
        for (_, local), parameter in zip(
            self.strategy.named_parameters(self.model), self.model.parameters(), strict=True
        ):
            _, rows = self.strategy.part(parameter.detach())
            whole = torch.arange(parameter.numel(), dtype=local.dtype).view(parameter.shape).sin()
            local.grad = whole if rows is None else whole[rows]
        self.optimizer.step()
        self.average.update()

    def contents(self, step: int) -> Contents:
        return self.strategy.for_checkpoint(step, self.model, self.objects, {"read": step})

    def whole(self) -> dict[str, Any]:
        """On rank 0 everything, gathered."""
        savers, self.strategy.savers = self.strategy.savers, None
        contents = self.contents(0)
        self.strategy.savers = savers
        return deepcopy({"model": contents.tensors, **contents.objects})

    def checkpointer(self, folder: Path, keep_last: int = 9) -> Checkpointer:
        return Checkpointer(folder, keep_last, together=self.strategy.savers)

    def open(self, folder: Path) -> dict[str, Any]:
        keeper = Checkpointer(folder, None)
        path = keeper.find_latest()
        assert path is not None
        return keeper.load(path, self.model, self.strategy.from_checkpoint(self.objects), self.strategy.part)


def trained(strategy: Strategy, updates: int = 2) -> Training:
    training = Training(strategy)
    for _ in range(updates):
        training.update()
    return training


def write(folder: Path, on_ranks: OnRanks, world_size: int = 3, settings: Settings = SHARES) -> dict[str, Any]:
    """Save step 2 on so many ranks; what these hold together."""

    def save(ranks: Ranks) -> dict[str, Any]:
        training = trained(Sharded(ranks, settings))
        assert training.checkpointer(folder).write(training.contents(2)).is_dir()
        return training.whole()

    whole: dict[str, Any] = on_ranks(save, world_size)[0]
    (folder.parent / "store").unlink(missing_ok=True)
    return whole


def named(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("world_size", "replicas"), [(3, 1), (4, 2)])
def test_the_folder_holds_what_one_process_would_write(
    world_size: int, replicas: int, tmp_path: Path, on_two_ranks: OnRanks
) -> None:
    """Read by DCP's own tool, and compared with the gathered state and with one process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = write(tmp_path / "run", on_two_ranks, world_size, Settings(replicas=replicas, saves_shares=True))
    assert_equal(whole, trained(ALONE).whole())
    folder = tmp_path / "run/checkpoints/step_00000002"
    shares = {f"__{rank}_0.distcp" for rank in range(world_size)}
    assert named(folder) == {".metadata", "state.json", "manifest.json", *shares}
    assert json.loads((folder / "state.json").read_text()) == {"read": 2, "step": 2}
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == named(folder) - {"manifest.json"}
    assert sealed_folder.find_damage(folder) is None
    assert (tmp_path / "run/checkpoints/latest").resolve() == folder
    dcp_to_torch_save(folder, tmp_path / "one.pt")
    assert_equal(torch.load(tmp_path / "one.pt", weights_only=True), whole)
    sizes = [(folder / name).stat().st_size for name in shares]
    assert max(sizes) < 0.5 * sum(sizes)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_opens_it(world_size: int, tmp_path: Path, on_two_ranks: OnRanks) -> None:
    whole = write(tmp_path / "run", on_two_ranks)

    def opened(strategy: Strategy) -> tuple[dict[str, Any], dict[str, Any]]:
        training = Training(strategy)
        return training.open(tmp_path / "run"), training.whole()

    if world_size == 1:
        state, found = opened(ALONE)
    else:
        state, found = on_two_ranks(lambda ranks: opened(Sharded(ranks, Settings())), world_size)[0]
    assert state == {"read": 2, "step": 2}
    assert_equal(found, whole)


def test_a_whole_checkpoint_goes_on_in_shares(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    alone = trained(ALONE)
    Checkpointer(tmp_path / "run", 9).write(alone.contents(2))

    def go_on(ranks: Ranks) -> dict[str, Any]:
        training = Training(Sharded(ranks, SHARES))
        training.open(tmp_path / "run")
        training.update()
        training.checkpointer(tmp_path / "run").write(training.contents(3))
        return training.whole()

    whole = on_two_ranks(go_on)[0]
    alone.update()
    assert_equal(whole, alone.whole())
    again = Training(ALONE)
    again.open(tmp_path / "run")
    assert_equal(again.whole(), whole)


def test_what_a_thread_writes_is_the_step_it_began_at(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    """While the main threads go on, and talk over their own group."""

    def save(ranks: Ranks) -> tuple[dict[str, Any], int, int]:
        training = trained(Sharded(ranks, SHARES))
        saves = Saves(training.checkpointer(tmp_path / "run"), ranks, in_background=True)
        saves.reserve(training.contents(2))
        held, whole = saves.host.nbytes, training.whole()
        saves.begin(Save(2, 0, 0), training.contents(2))
        for _ in range(20):
            training.update()
            ranks.sum([1])
        save = saves.finish()
        assert save is not None and save.path is not None and saves.saved_step == 2 and saves.close() is None
        return whole, held, saves.host.nbytes

    (whole, held, later), (_, other, _) = on_two_ranks(save)
    found = Training(ALONE)
    assert found.open(tmp_path / "run")["step"] == 2
    assert_equal(found.whole(), whole)
    alone = sum(tensor.nbytes for tensor in _tensors(whole))
    assert held == later and held + other < 1.1 * alone  # indices and numbers of updates twice


@pytest.mark.parametrize("owned", [(), ("units.1.weight", "units.1.bias", "head.weight")])
def test_what_was_gathered_is_not_copied_again(owned: tuple[str, ...], on_two_ranks: OnRanks) -> None:
    """Rank 0 has the whole state once, and it is that of the step, though training goes on."""

    def copied(ranks: Ranks) -> tuple[Any, Any, int]:
        strategy = Sharded(ranks, Settings())
        training = trained(strategy)
        if owned:
            strategy.give_owners(owned).labels = {"class": "AdamW", "groups": []}
            training.optimizer = torch.optim.AdamW(strategy.owners.updated_here(), lr=0.1)
            training.objects["optimizer"] = OptimizerState(training.optimizer, [])
            for parameter in training.optimizer.param_groups[0]["params"]:
                training.optimizer.state[parameter] = {"exp_avg": torch.full(parameter.shape, 1.0 + ranks.rank)}
        before = training.whole()
        live = training.contents(2)
        copy = HostCopy().take(live)
        moments = [state["exp_avg"] for state in training.optimizer.state.values()]
        for tensor in (*training.model.buffers(), *training.average.values.values(), *moments):
            strategy.part(tensor)[0].zero_()
        training.strategy.part(training.model.units[0].weight.detach())[0].zero_()
        now = {"model": copy.tensors, **copy.objects}
        return before, now, bytes_of(_tensors([{"model": live.tensors, **live.objects}, now]))

    (before, now, held), _ = on_two_ranks(copied)
    assert_equal(now, before)
    copied_twice = 2 * 9 + (4 * 40 if owned else 4 * 6)  # indices; moments of what rank 0 owns, or numbers of updates
    assert held == bytes_of(_tensors(now)) + copied_twice


def test_a_copy_that_fails_on_one_rank_leaves_no_other_writing(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    """Their threads would wait for a share that never comes; now the next save works."""

    def no_memory(contents: Contents) -> Contents:
        raise ValueError("no memory")

    def fail(ranks: Ranks) -> tuple[str, int]:
        training = trained(Sharded(ranks, SHARES))
        saves = Saves(training.checkpointer(tmp_path / "run"), ranks, in_background=True)
        if ranks.rank == 1:
            saves.host.take = no_memory  # type: ignore[method-assign]
        with pytest.raises(ValueError) as raised:
            saves.begin(Save(3, 0, 0), training.contents(3))
        saves.host = HostCopy()
        saves.begin(Save(4, 0, 0), training.contents(4))
        assert saves.finish() is not None
        return str(raised.value), saves.saved_step

    assert on_two_ranks(fail) == [("no memory", 4)] * 2
    assert named(tmp_path / "run/checkpoints") == {"step_00000004", "latest"}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in _tensors(inner)]
    if isinstance(value, list):
        return [tensor for inner in value for tensor in _tensors(inner)]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("stage", ["share", "seal", "manifest"])
@pytest.mark.parametrize("in_background", [False, True])
def test_what_fails_on_one_rank_is_raised_on_all(
    stage: str, in_background: bool, tmp_path: Path, on_two_ranks: OnRanks
) -> None:
    write(tmp_path / "run", on_two_ranks, 2)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(ranks: Ranks) -> tuple[str, bool, int]:
        training = trained(Sharded(ranks, SHARES))
        saves = Saves(training.checkpointer(tmp_path / "run", 1), ranks, in_background, step=2)
        with pytest.MonkeyPatch.context() as patch:
            if stage == "share" and ranks.rank == 1:
                patch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", full)
            elif stage == "seal" and ranks.rank == 1:
                patch.setattr(sealed_folder, "_seal", full)
            elif stage == "manifest":
                patch.setattr("sltrain.engine.sharded_files.publish_sealed", full)
            with pytest.raises(ValueError) as raised:
                saves.begin(Save(3, 0, 0), training.contents(3))
                saves.finish()
        assert not saves.has_failed
        saves = Saves(training.checkpointer(tmp_path / "other"), ranks)
        saves.begin(Save(4, 0, 0), training.contents(4))  # the group still works
        return str(raised.value), saves.finish() is not None, saves.saved_step

    for said, saved, step in on_two_ranks(fail):
        assert said.startswith("the checkpoint of step 3 could not be written") and "No space left" in said
        assert saved and step == 4
    assert named(tmp_path / "run/checkpoints") == {"step_00000002", "latest"}
    assert Training(ALONE).open(tmp_path / "run")["step"] == 2


def test_an_error_that_is_not_of_the_disk_is_raised_as_it_was() -> None:
    """Were it its own cause, whoever looks for the disk's reason in it would look for ever."""
    with pytest.raises(RuntimeError, match="no thread") as raised, sharded_files._reasons():
        raise RuntimeError("no thread")
    assert raised.value.__cause__ is None and sealed_folder.disk_reason(raised.value) is None


def test_only_the_newest_remain(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    def save(ranks: Ranks) -> None:
        training = trained(Sharded(ranks, SHARES), 1)
        keeper = training.checkpointer(tmp_path / "run", 2)
        for step in (1, 2, 3, 3):
            keeper.write(training.contents(step))

    on_two_ranks(save)
    assert named(tmp_path / "run/checkpoints") == {"step_00000002", "step_00000003", "latest"}


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "state.json"])
def test_without_a_share_it_is_no_checkpoint(file: str, tmp_path: Path, on_two_ranks: OnRanks) -> None:
    write(tmp_path / "run", on_two_ranks, 2)
    folder = tmp_path / "run/checkpoints/step_00000002"
    flipped = bytearray((folder / file).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for to_train in (True, False):
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=f"step_00000002 is damaged .{file} is missing"):
            Checkpointer(tmp_path / "run", None, to_train).find(2)
        (folder / file).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"step_00000002 is damaged .{file} does not match its SHA-256"):
            Checkpointer(tmp_path / "run", None, to_train).find(2)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
        Checkpointer(tmp_path / "run", None).find_latest()


def test_another_model_or_other_objects_are_refused(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    write(tmp_path / "run", on_two_ranks, 2)
    folder = tmp_path / "run/checkpoints/step_00000002"
    training = Training(ALONE)
    before = deepcopy(training.model.state_dict())
    for objects, text in (
        ({"optimizer": training.objects["optimizer"]}, "has action/ema, unknown to this run"),
        ({**training.objects, "action/pool": training.average}, "has no action/pool, which this run needs"),
        ({**training.objects, "optimizer": _of_another(training)}, "of another optimizer: this run expects SGD"),
    ):
        with pytest.raises(CheckpointError, match=text):
            Checkpointer(tmp_path / "run", None).load(folder, training.model, objects)
    training.model.head = nn.Linear(5, 2)
    with pytest.raises(CheckpointError, match="head.weight: this run expects float32 .2, 5., .* bfloat16 .1, 5."):
        Checkpointer(tmp_path / "run", None).load(folder, training.model, None)
    assert torch.equal(training.model.indices, before["indices"])


def _of_another(training: Training) -> OptimizerState:
    return OptimizerState(torch.optim.SGD(training.model.named_parameters(), lr=0.1), [])


def test_rows_that_no_share_has_are_missed(tmp_path: Path, on_two_ranks: OnRanks) -> None:
    """As where a share of another save lies in the folder."""
    write(tmp_path / "run", on_two_ranks, 2)
    folder = shutil.copytree(tmp_path / "run/checkpoints/step_00000002", tmp_path / "changed")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.units.0.weight"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    files = ShardedFiles(folder)
    assert read_all(files.state("optimizer"))["class"] == "AdamW"
    assert files.tensors()["units.0.weight"].read(slice(0, 4)).shape == (4, 4)
    for rows in (None, slice(3, 5)):
        with pytest.raises(CheckpointError, match="lacks rows of model.units.0.weight"):
            files.tensors()["units.0.weight"].read(rows)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"asks for (posix|nt).mkdir, which no checkpoint needs"):
        ShardedFiles(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_writer_names_no_path_of_this_machine(tmp_path: Path) -> None:
    assert _Writer(tmp_path).storage_meta() is None
