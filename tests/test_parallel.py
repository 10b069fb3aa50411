"""One run with parallel=fsdp, as a user starts it: the curve of one process, a folder that any command opens, continued
with another strategy; and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_equal
from safetensors.torch import load_file
from torch import Tensor

import sltrain
from sltrain.engine.checkpoint import MODEL_FILE, object_file
from sltrain.engine.sharded_files import ShardedFiles, read_all

Run = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict[str, Any]]]


def fork(fork_train: Any, *arguments: str, num_ranks: int) -> str:
    process = fork_train(*arguments, num_ranks=num_ranks)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["optimizer=adamw", "grad_clip=0.5"],
        ["optimizer=muon", "grad_clip=0.5"],
        ["optimizer=adam8bit", "grad_clip=0.5"],
        ["optimizer=muon", "grad_clip=null", "per_layer_update=true"],
    ],
)
def test_a_run_goes_on_in_shards_and_back(
    how: list[str], tiny: list[str], tmp_path: Path, sltrain_train: Run, fork_train: Any, metrics_of: Metrics
) -> None:
    recipe = [*tiny, "schedule=constant", "micro_batch_size=2", "sparsity=0.06", *how, "ema=0.9"]
    recipe += ["max_steps=2", "warmup_steps=0", "keep_last=9"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert sltrain_train(*recipe, "max_steps=6", f"run_dir={straight}")[0] == 0
    assert sltrain_train(*recipe, f"run_dir={run}")[0] == 0
    said = fork(fork_train, *recipe, "extend=2", "parallel=fsdp", f"run_dir={run}", num_ranks=2)
    assert "parallel   fsdp: each process holds 1/2 of every tensor" in said
    assert sltrain_train(*recipe, "extend=4", f"run_dir={run}")[0] == 0
    lines, ours = ([line for line in metrics_of(path) if line["event"] == "train"] for path in (straight, run))
    assert [line["step"] for line in ours] == [line["step"] for line in lines]
    for line, other in zip(lines, ours, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert other["low_rank_norm"] == pytest.approx(line["low_rank_norm"], rel=1e-4)
    checkpoint = run / "checkpoints" / "step_00000004"  # of the sharded part: the files of one process
    tensors, state = load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "optimizer.pt")["state"]
    of_one = torch.load(straight / "checkpoints" / "step_00000006" / "optimizer.pt")["state"]
    assert {n: {k: v.shape for k, v in s.items() if isinstance(v, Tensor)} for n, s in state.items()} == {
        n: {k: v.shape for k, v in s.items() if isinstance(v, Tensor)} for n, s in of_one.items()
    }
    assert tensors.keys() == load_file(straight / "checkpoints" / "step_00000006" / "model.safetensors").keys()
    assert sltrain.evaluate(run)["loss"] == pytest.approx(metrics_of(run)[-1]["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adam8bit"])
def test_shares_hold_what_a_gathered_checkpoint_holds(
    optimizer: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, fork_train: Any, metrics_of: Metrics
) -> None:
    """Of two runs that differ in this alone; both are then continued by one process."""
    recipe = [*tiny, "schedule=constant", "micro_batch_size=2", "sparsity=0.06", f"optimizer={optimizer}", "ema=0.9"]
    recipe += ["max_steps=3", "warmup_steps=0", "keep_last=9", "checkpoint_async=true"]
    runs = {form: tmp_path / form for form in ("whole", "sharded")}
    for form, run in runs.items():
        fork(fork_train, *recipe, "parallel=fsdp", f"parallel.checkpoint={form}", f"run_dir={run}", num_ranks=2)
    whole, shares = (run / "checkpoints/step_00000003" for run in runs.values())
    files = ShardedFiles(shares)
    assert_equal({name: each.read(None) for name, each in files.tensors().items()}, load_file(whole / MODEL_FILE))
    assert files.objects == {"optimizer", "action/ema"}
    for name in files.objects:
        assert_equal(read_all(files.state(name)), torch.load(whole / object_file(name), weights_only=True))
    assert sltrain.evaluate(runs["sharded"])["loss"] == sltrain.evaluate(runs["whole"])["loss"]
    texts = [sltrain.generate(run, "def ", max_new_tokens=8, temperature=0) for run in runs.values()]
    assert texts[0] == texts[1]
    for run in runs.values():
        assert sltrain_train("extend=3", f"run_dir={run}")[0] == 0
    last = [load_file(run / "checkpoints/step_00000006" / MODEL_FILE) for run in runs.values()]
    assert_equal(last[0], last[1])
    whole_lines, lines = (metrics_of(run) for run in runs.values())
    assert [line.get("loss") for line in whole_lines] == [line.get("loss") for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (["parallel=single"], "parallel=single is for one process"),
        (["parallel=hsdp", "parallel.replicas=3"], "set parallel.replicas to one of 1, 2"),
        (
            ["parallel=fsdp", "method.restart_every=4", "method.restart_warmup=1"],
            "method=sltrain changes",
        ),
    ],
)
def test_what_cannot_work_is_said_once(
    typed: list[str], text: str, tiny: list[str], tmp_path: Path, fork_train: Any
) -> None:
    process = fork_train(*tiny, *typed, f"run_dir={tmp_path}/run", num_ranks=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert sum(text in line for line in err.splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_strategy_is_refused_with_the_known_ones(tiny: list[str], sltrain_train: Run) -> None:
    code, _, err = sltrain_train(*tiny, "parallel=zero3")
    assert code == 2 and "fsdp" in err and "Traceback" not in err
