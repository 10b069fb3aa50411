"""checkpoint_async=true, as a user types it: the checkpoints of a run that waits for each, and nothing lost by a kill,
a signal, a full disk or a want of memory while one is written."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_equal

from sltrain.engine import sealed_folder
from sltrain.engine.sealed_folder import find_damage
from sltrain.engine.trainer import Trainer

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict]]
Start = Callable[..., Any]
ASYNC = "checkpoint_async=true"
SHARES = ["parallel=fsdp", "parallel.checkpoint=sharded", "micro_batch_size=2"]  # each of two ranks writes


def assert_same_checkpoint(one: Path, two: Path, step: int) -> None:
    """Equal weights and plain data, and states equal in every tensor's dtype and bits."""
    assert_equal(*(contents_of(run, step) for run in (one, two)))


def contents_of(run: Path, step: int) -> dict[str, Any]:
    """What the files of a checkpoint hold; of state.json what does not depend on the clock."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    assert find_damage(folder) is None
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    files |= {name: torch.load(folder / name, weights_only=True) for name in files if name.endswith(".pt")}
    files["state.json"] = json.loads(files["state.json"])
    files["state.json"]["progress"].pop("wall_seconds")
    return files


def steps_saved(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoints/step_*"))


def noted(lines: list[dict]) -> list[int]:
    return [line["step"] for line in lines if line["event"] == "checkpoint"]


def slow_disk(patch: pytest.MonkeyPatch, seconds: float = 0.2) -> None:
    """Every file takes this much longer, so that training is ahead of its checkpoint."""
    real = sealed_folder._seal

    def seal(path: Path) -> dict[str, Any]:
        time.sleep(seconds)
        return real(path)

    patch.setattr(sealed_folder, "_seal", seal)


@pytest.mark.parametrize(
    "how",
    [
        "micro_batch_size=8",
        "dtype=bfloat16 ema=0.7 per_layer_update=true",
        "method=slope method.adapter_share=0.5 model.tie_word_embeddings=true",
    ],
)
def test_every_checkpoint_is_that_of_a_run_that_waits(
    how: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = [*tiny, *how.split(), "checkpoint_every=1", "keep_last=9", "max_steps=5"]
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/waits")[0] == 0
    slow_disk(monkeypatch, 0.05)
    code, out, err = sltrain_train(*recipe, ASYNC, f"run_dir={tmp_path}/goes_on")
    assert code == 0, err
    assert out.count(" saved: training waited ") == 5
    for step in range(1, 6):
        assert_same_checkpoint(tmp_path / "goes_on", tmp_path / "waits", step)
    lines = metrics_of(tmp_path / "goes_on")
    assert noted(lines) == [1, 2, 3, 4, 5] and lines[-1]["event"] == "final"
    saves = [line for line in lines if line["event"] == "checkpoint"]
    assert all(0 < line["blocked_seconds"] <= line["save_seconds"] for line in saves)
    assert [line["tokens"] for line in saves] == [line["tokens"] for line in lines if line["event"] == "train"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_go_on_while_one_writes(
    parallel: str,
    tiny: list[str],
    tmp_path: Path,
    fork_train: Start,
    metrics_of: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = [*tiny, f"parallel={parallel}", "micro_batch_size=2", "checkpoint_every=2", "keep_last=9"]
    waits = fork_train(*recipe, f"run_dir={tmp_path}/waits", num_ranks=2)
    assert waits.wait() == 0, waits.communicate()
    slow_disk(monkeypatch)
    goes_on = fork_train(*recipe, ASYNC, f"run_dir={tmp_path}/goes_on", num_ranks=2)
    assert goes_on.wait() == 0, goes_on.communicate()
    for step in (2, 4, 6):
        assert_same_checkpoint(tmp_path / "goes_on", tmp_path / "waits", step)
    kinds = [(line["event"], line["step"]) for line in metrics_of(tmp_path / "goes_on")]
    assert kinds.index(("checkpoint", 2)) > kinds.index(("train", 3)), "it did go on"


@pytest.mark.parametrize("shares", [[], SHARES])
def test_kill_while_a_checkpoint_is_written(
    shares: list[str],
    tiny: list[str],
    tmp_path: Path,
    fork_train: Start,
    metrics_of: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one before remains and is continued, to the end of a run that was never stopped."""
    recipe, run, num_ranks = [*tiny, *shares, "checkpoint_every=2"], tmp_path / "run", 2 if shares else 1
    assert fork_train(*recipe, f"run_dir={tmp_path}/straight", num_ranks=num_ranks).wait() == 0
    slow_disk(monkeypatch)
    process = fork_train(*recipe, ASYNC, f"run_dir={run}", num_ranks=num_ranks)
    while not ((run / "metrics.jsonl").exists() and 2 in noted(metrics_of(run)) and list(run.glob("*/*04.tmp"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    monkeypatch.undo()
    assert steps_saved(run) == ["step_00000002", "step_00000004.tmp"]
    process = fork_train(*shares, f"run_dir={run}", num_ranks=num_ranks)
    out, err = process.communicate()
    assert process.returncode == 0 and "from step 2 " in out, err
    assert_same_checkpoint(run, tmp_path / "straight", 6)
    losses = [[line["loss"] for line in metrics_of(tmp_path / n) if "loss" in line] for n in ("run", "straight")]
    assert losses[0] == losses[1] and steps_saved(run) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(("num_ranks", "shares"), [(1, []), (2, []), (2, SHARES)])
def test_a_full_disk_ends_the_run_before_its_next_update(
    num_ranks: int,
    shares: list[str],
    tiny: list[str],
    tmp_path: Path,
    fork_train: Start,
    metrics_of: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, recipe = sealed_folder._seal, [*tiny, ASYNC, "micro_batch_size=2", *shares, "checkpoint_every=2"]

    def full(path: Path) -> dict[str, Any]:
        if "step_00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(sealed_folder, "_seal", full)
        process = fork_train(*recipe, "max_steps=200", f"run_dir={tmp_path}/run", num_ranks=num_ranks)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("error: ") == 1 and "No space left on device" in err, out + err
    assert steps_saved(tmp_path / "run") == ["step_00000002"] and "of step 4 saved" not in out
    lines = metrics_of(tmp_path / "run")
    assert noted(lines) == [2] and lines[-1]["event"] == "train"
    assert 4 <= lines[-1]["step"] < 200


def test_a_signal_saves_its_step_after_the_one_that_is_written(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.log

    def log(self: Trainer, *arguments: object) -> None:
        real(self, *arguments)
        if self.step == 3:
            assert self.saves.begun_step == 2 and self.saved_step == -1
            signal.raise_signal(signal.SIGTERM)

    slow_disk(monkeypatch)
    monkeypatch.setattr(Trainer, "log", log)
    code, out, _ = sltrain_train(*tiny, ASYNC, "checkpoint_every=2", f"run_dir={tmp_path}/run")
    assert code == 3 and "interrupted (SIGTERM); saved at step 3" in out
    assert steps_saved(tmp_path / "run") == ["step_00000002", "step_00000003"]
    lines = metrics_of(tmp_path / "run")
    assert noted(lines) == [2, 3] and lines[-1]["event"] == "stopped"
    last = [line for line in lines if line["event"] == "checkpoint"][-1]
    assert last["blocked_seconds"] == last["save_seconds"]


def test_a_second_ctrl_c_ends_the_run_when_its_checkpoint_is_written(
    tiny: list[str], tmp_path: Path, fork_train: Start, metrics_of: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.log

    def impatient(self: Trainer, *arguments: object) -> None:
        real(self, *arguments)
        if self.step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    slow_disk(monkeypatch)
    monkeypatch.setattr(Trainer, "log", impatient)
    process = fork_train(*tiny, ASYNC, "checkpoint_every=2", f"run_dir={tmp_path}/run")
    out, err = process.communicate()
    assert process.returncode == 3 and "step 2 is saved" in out + err, out + err
    assert steps_saved(tmp_path / "run") == ["step_00000002"] and noted(metrics_of(tmp_path / "run")) == [2]


def test_running_out_of_memory_waits_and_saves(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.train

    def hungry(self: Trainer, *arguments: Any) -> Any:
        if self.step == 3:
            torch.empty(10**15)
        return real(self, *arguments)

    slow_disk(monkeypatch)
    monkeypatch.setattr(Trainer, "train", hungry)
    code, _, err = sltrain_train(*tiny, ASYNC, "checkpoint_every=2", f"run_dir={tmp_path}/run")
    assert code == 2 and "out of memory after step 3" in err and "step 3 is saved" in err
    assert steps_saved(tmp_path / "run") == ["step_00000002", "step_00000003"]


def test_more_saves_than_the_disk_takes_are_told(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_disk(monkeypatch)
    monkeypatch.setattr("sltrain.engine.trainer.LONG_WAIT_SECONDS", 0.3)
    code, out, _ = sltrain_train(*tiny, ASYNC, "checkpoint_every=1", "max_steps=3", f"run_dir={tmp_path}/run")
    assert code == 0 and "step 2 waited 0." in out and "for the checkpoint of step 1; with a higher" in out


@pytest.mark.parametrize("how", ["ema=0.9", "per_layer_update=true optimizer=adam8bit micro_batch_size=8"])
def test_the_copy_is_planned(
    how: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    sizes = ["model.hidden_size=128", "model.intermediate_size=352", "rank=16", "seq_len=128", "max_steps=4"]
    peaks = {}
    for name, wanted in (("with", ASYNC), ("without", "checkpoint_async=false")):
        code, _, err = sltrain_train(*tiny, *sizes, *how.split(), wanted, f"run_dir={tmp_path}/{name}")
        assert code == 0, err
        last = metrics_of(tmp_path / name)[-1]
        assert last["peak_tensor_bytes"] == pytest.approx(last["planned_memory_bytes"], rel=0.05)
        peaks[name] = last["peak_tensor_bytes"]
    checkpoint = tmp_path / "with" / "checkpoints" / "latest"
    saved = sum(path.stat().st_size for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".pt"))
    assert peaks["with"] - peaks["without"] == pytest.approx(saved, rel=0.05)
