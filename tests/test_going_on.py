"""Runs that go on: continued by their folder alone, extended, and begun with the weights of another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resuming import assert_equal, lines, stopped_at

import sltrain
from sltrain.compose import read_config

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]


def same_end(ours: Path, theirs: Path) -> None:
    """Assert that the last checkpoints are equal, and the numbers of all updates."""
    assert lines(ours) == lines(theirs)
    last = max((theirs / "checkpoints").glob("step_*")).name
    a, b = (run / "checkpoints" / last for run in (ours, theirs))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert_equal(*(torch.load(folder / "optimizer.pt", weights_only=True) for folder in (a, b)))


@pytest.fixture(scope="module")
def straight(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six updates with all its checkpoints, by the paper's cosine."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    sltrain.train(overrides=[*tiny, f"run_dir={folder}", "checkpoint_every=1", "keep_last=99"])
    return folder


def test_the_folder_alone_continues_bit_for_bit(straight: Path, sltrain_train: Run, tmp_path: Path) -> None:
    stopped = stopped_at(straight, 3, tmp_path / "stopped")
    code, _, err = sltrain_train(f"run_dir={stopped}", "max_steps=4")
    assert code == 2 and err.endswith("max_steps was 6, is now 4. Use the old values, or choose another run_dir\n")
    code, _, err = sltrain_train(f"run_dir={stopped}", "lr=1", "seed=4")
    assert code == 2 and "lr was 0.006, is now 1.0; seed was 42, is now 4" in err
    run = sltrain.train(run_dir=str(stopped), keep_last=3)
    assert run.outcome == "finished" and len(list((stopped / "checkpoints").glob("step_*"))) == 3
    same_end(stopped, straight)
    code, out, _ = sltrain_train(f"run_dir={stopped}")
    assert code == 0 and "nothing to do" in out


@pytest.mark.parametrize(("schedule", "stop"), [(["schedule=constant"], None), (["schedule=wsd", "decay_steps=2"], 4)])
def test_an_extended_run_is_one_that_had_the_longer_budget(
    schedule: list[str], stop: int | None, tiny: list[str], sltrain_train: Run, tmp_path: Path
) -> None:
    """A finished one goes on too, where its schedule never left the constant part."""
    every = [*tiny, *schedule, "checkpoint_every=1", "keep_last=99", "log_every=1"]
    longer, run = tmp_path / "longer", tmp_path / "run"
    assert sltrain_train(*every, "max_steps=9", f"run_dir={longer}")[0] == 0
    assert sltrain_train(*every, f"run_dir={run}")[0] == 0
    if stop is not None:
        code, _, err = sltrain_train(f"run_dir={run}", "extend=3")
        assert code == 2 and "other learning rates (schedule=wsd)" in err and f"init_from={run} max_steps=3" in err
        assert (run / "summary.json").exists()
        run = stopped_at(run, stop, tmp_path / "stopped")
    code, _, err = sltrain_train(f"run_dir={run}", "max_steps=9")
    assert code == 2 and "max_steps was 6, is now 9." in err
    assert err.endswith(f"For more updates: sltrain-train run_dir={run} extend=3\n"), err
    for _ in range(2):  # the same command again adds nothing
        code, out, err = sltrain_train(f"run_dir={run}", "extend=3")
        assert code == 0, err
    assert "nothing to do" in out
    same_end(run, longer)
    assert json.loads((run / "summary.json").read_text())["step"] == 9
    code, _, err = sltrain_train(f"run_dir={run}", "extend=0")
    assert code == 2 and "extend=0 gives 6 updates, and 9 are done" in err


def test_a_cosine_is_not_extended_but_for_its_warmup(straight: Path, sltrain_train: Run, tmp_path: Path) -> None:
    run, warm = stopped_at(straight, 6, tmp_path / "run"), stopped_at(straight, 2, tmp_path / "warm")
    code, _, err = sltrain_train(f"run_dir={run}", "extend=4")
    assert code == 2 and "(schedule=cosine); a new run from its weights: sltrain-train init_from=" in err
    code, _, other = sltrain_train(f"run_dir={run}", "max_steps=10", "lr=1")
    assert code == 2 and "lr was 0.006, is now 1.0; max_steps was 6, is now 10" in other
    assert other.rpartition("extend=4 cannot add updates: ")[2] == err.rpartition("extend=4: ")[2]
    code, out, err = sltrain_train(*err.rpartition("sltrain-train ")[2].split())  # the line that it names
    assert code == 0 and f"init from  {run}, step 6: all weights copied" in out, err
    code, _, err = sltrain_train(f"run_dir={warm}", "extend=4")
    assert code == 0 and "step 10/10" in err, err


def test_a_run_from_weights_goes_on_when_these_are_gone(tiny: list[str], sltrain_train: Run, tmp_path: Path) -> None:
    dense, run = tmp_path / "dense", tmp_path / "run"
    assert sltrain_train(*tiny, "method=full", f"run_dir={dense}")[0] == 0
    typed = [f"init_from={dense}", "method=sltrain", "sparsity=0.1", "seed=7", "checkpoint_every=1", "keep_last=99"]
    code, out, err = sltrain_train(*typed, f"run_dir={run}")
    assert code == 0 and "14 matrices approximated, relative error: median 0." in out, err
    config = read_config(run / "config.yaml")
    assert (config.init_from, config.tokenizer) == (str(dense), f"{dense}/tokenizer.json")
    assert json.loads((run / "summary.json").read_text())["init_from"] == str(dense)
    (row,) = sltrain.report(run)
    assert row.init_from == str(dense)
    output = sltrain.export(run, tmp_path / "export")
    assert f"| start | the weights of {dense} |" in (output / "README.md").read_text()
    stopped, again = (stopped_at(run, step, tmp_path / f"stopped_{step}") for step in (3, 4))
    shutil.rmtree(dense)
    code, out, err = sltrain_train(*typed, f"run_dir={stopped}")
    assert code == 0 and "init from" not in out, err
    same_end(stopped, run)
    assert sltrain_train(f"run_dir={again}")[0] == 0
    same_end(again, run)
    code, _, err = sltrain_train(*tiny, f"init_from={dense}", f"run_dir={tmp_path / 'other'}")
    assert code == 2 and f"init_from={dense}: there is no such folder here" in err
    assert not (tmp_path / "other").exists()


def test_two_processes_begin_with_the_weights_of_one(
    straight: Path, sltrain_train: Run, fork_train: Callable, tmp_path: Path
) -> None:
    """They share the decompositions."""
    typed = [f"init_from={straight}", "method=low_rank", "max_steps=1", "lr=1e-30"]
    assert sltrain_train(*typed, f"run_dir={tmp_path / 'one'}")[0] == 0
    two = fork_train(*typed, f"run_dir={tmp_path / 'two'}", num_ranks=2)
    _, err = two.communicate(timeout=240)
    assert two.returncode == 0, err
    one, both = (tmp_path / name / "checkpoints" / "step_00000001" / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == both.read_bytes()
