"""The command as a user types it: a run and its files, interruptions, several ranks, sweeps."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sltrain.commands.sweep import with_swept_before

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict]]
Start = Callable[..., Any]


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step_*"))[-1]


def has_checkpoint(run_dir: Path, step: int, suffix: str = "") -> bool:
    """Whether there is (or, with suffix=".tmp", is being written) a checkpoint of `step` or later."""
    return any(int(path.name[5:13]) >= step for path in run_dir.glob(f"checkpoints/step_????????{suffix}"))


def wait_for(condition: Callable[[], bool], process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def same_checkpoint(a: Path, b: Path) -> None:
    """Assert that two run folders end with the same weights and optimizer state, bit for bit."""
    first, second = load_file(newest(a) / "model.safetensors"), load_file(newest(b) / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [torch.load(newest(folder) / "optimizer.pt", weights_only=True)["state"] for folder in (a, b)]
    assert states[0] and states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name][key])) for key, value in state.items()
        )


def without_clocks(lines: list[dict]) -> list[dict]:
    """Train and eval lines without what depends on the clock and the memory of the process."""
    clocks = {"tokens_per_second", "tflops", "data_wait_fraction", "peak_memory_bytes", "wall_seconds", "path"}
    clocks |= {"peak_tensor_bytes", "planned_memory_bytes"}
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines if line["event"] != "checkpoint"]


@pytest.mark.parametrize("method", ["sltrain", "full"])
def test_run_and_its_files(
    method: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    run_dir = tmp_path / "run"
    code, out, _ = sltrain_train(*tiny, f"method={method}", f"run_dir={run_dir}", "eval_every=3", "checkpoint_every=3")
    assert code == 0
    assert "parameters" in out and "6 updates" in out and str(run_dir) in out
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json", "tokenizer.json"} <= {
        p.name for p in run_dir.iterdir()
    }

    lines = metrics_of(run_dir)
    train = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert all(line["tokens"] <= line["positions"] == line["step"] * 8 * 32 for line in train)
    numbers = {"loss", "lr", "grad_norm", "tokens_per_second", "tflops", "peak_memory_bytes", "data_wait_fraction"}
    assert all(numbers <= line.keys() and "mfu" not in line for line in train)
    assert ("sparse_norm" in train[0]) == (method != "full")
    assert [line["step"] for line in lines if line["event"] == "eval"] == [3]
    assert [line["step"] for line in lines if line["event"] == "checkpoint"] == [3, 6]

    final = lines[-1]
    assert final["event"] == "final" and json.loads((run_dir / "summary.json").read_text()) == final
    assert set(final["num_parameters"]) == {"total", "dense", "low_rank", "sparse"}
    assert {
        "loss",
        "perplexity",
        "perplexity_galore_protocol",
        "bits_per_byte",
        "eval_tokens",
        "wall_seconds",
    } <= final.keys()
    assert final["perplexity_galore_protocol"] < final["perplexity"]
    assert final["peak_memory_measure"] == "peak resident size"
    assert train[-1]["loss"] < train[0]["loss"]


def test_finished_run_is_left_alone(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    run = [*tiny, f"run_dir={tmp_path}/run"]
    assert sltrain_train(*run)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, out, _ = sltrain_train(*run)
    assert code == 0 and "finished" in out
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = sltrain_train(*run, "resume=never")
    assert code == 2 and "holds a run" in err


def test_changed_mathematics_is_refused_by_name(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    run = [*tiny, f"run_dir={tmp_path}/run"]
    assert sltrain_train(*run)[0] == 0
    code, _, err = sltrain_train(*run, "rank=4")
    assert code == 2 and "rank was 8, is now 4" in err
    assert sltrain_train(*run, "log_every=5", "micro_batch_size=8")[0] == 0


def test_without_run_dir_every_run_has_a_new_folder(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert sltrain_train(*tiny, "max_steps=1", "warmup_steps=0")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert len(list((tmp_path / "outputs").iterdir())) == 2


def test_interrupted_twice_equals_straight(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, fork_train: Start, metrics_of: Metrics
) -> None:
    """SIGHUP, then SIGKILL in the middle of a save, then to the end: the weights, the moments and the log of the
    straight run."""
    recipe = [*tiny, "max_steps=80", "checkpoint_every=5", "eval_every=37", "padding=pack"]
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/straight")[0] == 0
    broken = tmp_path / "broken"

    first = fork_train(*recipe, f"run_dir={broken}")
    wait_for(lambda: has_checkpoint(broken, 5), first)
    first.send_signal(signal.SIGHUP)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 3, err
    assert f"run_dir={broken}" in out
    step = metrics_of(broken)[-1]["step"]
    assert 5 <= step < 80

    second = fork_train(*recipe, f"run_dir={broken}")
    wait_for(lambda: has_checkpoint(broken, step + 3, ".tmp"), second)
    second.kill()
    second.wait()

    third = fork_train(*recipe, f"run_dir={broken}")
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0, err
    assert "resume" in out
    same_checkpoint(tmp_path / "straight", broken)
    assert without_clocks(metrics_of(broken)) == without_clocks(metrics_of(tmp_path / "straight"))
    assert not list(broken.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("support", "path"),
    [
        ("uniform", "composed"),
        ("stratified", "factored"),
        ("block", "auto"),
        ("slice", "factored"),
        ("rolled", "factored"),
    ],
)
def test_every_support_learns_and_resumes_exactly(
    support: str, path: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    recipe = [*tiny, f"support={support}", f"layer_path={path}", "sparsity=0.06", "checkpoint_every=3"]
    straight, again = tmp_path / "straight", tmp_path / "again"
    code, out, err = sltrain_train(*recipe, f"run_dir={straight}")
    assert code == 0, err
    assert "layers     14 of 14 " in out and (path == "auto" or f"14 of 14 {path}" in out)
    shutil.copytree(straight, again, symlinks=True)
    shutil.rmtree(newest(again))
    (again / "summary.json").unlink()
    code, out, err = sltrain_train(*recipe, f"run_dir={again}")
    assert code == 0 and "from step 3" in out, err
    same_checkpoint(straight, again)
    lines = metrics_of(straight)
    assert without_clocks(metrics_of(again)) == without_clocks(lines)
    assert lines[5]["loss"] < lines[0]["loss"]


def test_a_continued_run_keeps_its_paths(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto chooses anew only in a new run: a continued one computes as it did, on whatever machine."""
    run = [*tiny, f"run_dir={tmp_path}/run", "checkpoint_every=3", "layer_path=auto"]
    monkeypatch.setattr("sltrain.layers.cost.choose_path", lambda *shape: "composed")
    assert "14 of 14 composed" in sltrain_train(*run)[1]
    shutil.rmtree(newest(tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr("sltrain.layers.cost.choose_path", lambda *shape: "factored")
    assert "14 of 14 composed" in sltrain_train(*run)[1]
    assert "14 of 14 factored" in sltrain_train(*tiny, f"run_dir={tmp_path}/new", "layer_path=auto")[1]


def test_second_process_in_a_live_folder_is_refused(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, fork_train: Start
) -> None:
    run = [*tiny, "max_steps=100000", f"run_dir={tmp_path}/run"]
    live = fork_train(*run)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), live)
    code, _, err = sltrain_train(*run)
    assert code == 2 and "in use" in err and str(live.pid) in err
    live.send_signal(signal.SIGINT)
    assert live.wait(60) == 3


@pytest.mark.parametrize(("padding", "support"), [("truncate_pad", "stratified"), ("pack", "block")])
def test_two_ranks_train_the_curve_of_one(
    padding: str,
    support: str,
    tiny: list[str],
    tmp_path: Path,
    sltrain_train: Run,
    fork_train: Start,
    metrics_of: Metrics,
) -> None:
    recipe = [*tiny, f"padding={padding}", f"support={support}", "sparsity=0.06", "micro_batch_size=2"]
    recipe += ["grad_clip=0.5", "checkpoint_every=3"]
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/one")[0] == 0
    two = fork_train(*recipe, f"run_dir={tmp_path}/two", num_ranks=2)
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0, err
    assert out.count("run folder") == 1
    one_lines, two_lines = (without_clocks(metrics_of(tmp_path / name)) for name in ("one", "two"))
    assert [line["event"] for line in one_lines] == [line["event"] for line in two_lines]
    for a, b in zip(one_lines, two_lines, strict=True):
        assert (a["step"], a["tokens"], a["positions"]) == (b["step"], b["tokens"], b["positions"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_resume_on_another_number_of_ranks(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, start_process: Start, metrics_of: Metrics
) -> None:
    recipe = [*tiny, "max_steps=40", "micro_batch_size=2"]
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/straight")[0] == 0
    run_dir = tmp_path / "run"
    two = start_process(*recipe, "checkpoint_every=1", f"run_dir={run_dir}", num_ranks=2)
    wait_for(lambda: has_checkpoint(run_dir, 3), two)
    two.send_signal(signal.SIGTERM)
    out, err = two.communicate(timeout=60)
    assert "saved at step" in out, out + err
    assert sltrain_train(*recipe, f"run_dir={run_dir}")[0] == 0
    for a, b in zip(
        without_clocks(metrics_of(run_dir)), without_clocks(metrics_of(tmp_path / "straight")), strict=True
    ):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_bad_input_under_torchrun_is_said_once(tiny: list[str], tmp_path: Path, fork_train: Start) -> None:
    process = fork_train(*tiny, "rank=33", f"run_dir={tmp_path}/run", num_ranks=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert sum(line.startswith(("error:", "[rank")) and "33" in line for line in err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_sweep(tiny: list[str], tmp_path: Path, start_process: Start, metrics_of: Metrics) -> None:
    """Deterministic folders, a failed job that costs only itself, and a second start that skips what is finished
    although nobody reads what it prints."""
    grid = ["max_steps=2", "warmup_steps=0", "rank=4,33", "sparsity=0.01"]
    command = ["-m", *tiny, *grid, "hydra/launcher=basic", f"run_dir={tmp_path}/sweep"]
    out, err = start_process(*command).communicate(timeout=240)
    assert "[1/2] rank-4: finished" in out and "rank-33: refused (exit code 2)" in out, out + err
    assert "perplexity" in out.partition(f"sweep {tmp_path}/sweep")[2]  # the report's table
    assert "error: " in err
    first = (tmp_path / "sweep" / "rank-4" / "metrics.jsonl").read_bytes()
    assert metrics_of(tmp_path / "sweep" / "rank-4")[-1]["event"] == "final"
    assert not (tmp_path / "sweep" / "rank-33").exists()

    again = start_process(*[text.replace("rank=4,33", "rank=4,8") for text in command])
    assert again.stdout is not None and again.stderr is not None
    again.stdout.close()
    again.stderr.close()
    assert again.wait(timeout=240) == 0
    assert metrics_of(tmp_path / "sweep" / "rank-8")[-1]["event"] == "final"
    assert (tmp_path / "sweep" / "rank-4" / "metrics.jsonl").read_bytes() == first

    alone = ["-m", f"run_dir={tmp_path}/sweep"]  # Hydra's record has the rest
    before, (*typed, folder) = with_swept_before(alone, alone[1:])
    assert typed == [text.replace("rank=4,33", "rank=4,8") for text in command[1:-1]] and folder == alone[1]
    assert before == [*typed, *alone]
    with pytest.raises(ValueError, match="holds no sweep to continue"):
        with_swept_before(["-m", "run_dir=/nowhere"], ["run_dir=/nowhere"])


def test_sweep_refusals(tiny: list[str], sltrain_train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = sltrain_train("-m", *tiny, "rank=4,x")
    assert code == 2 and "rank=x" in err
    code, _, err = sltrain_train("-m", *tiny, "run_dir=a,b")
    assert code == 2 and "run_dir" in err
    code, _, err = sltrain_train(*tiny, "hydra/launcher=slurm")
    assert code == 2 and "add -m" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = sltrain_train("-m", *tiny, "rank=4,8")
    assert code == 2 and "torchrun" in err


def test_full_disk_on_save_keeps_the_previous_checkpoint(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sltrain.engine import sealed_folder

    real = sealed_folder._seal

    def full(path: Path) -> dict:
        if "step_00000004" in str(path):
            raise OSError(28, os.strerror(28))
        return real(path)

    monkeypatch.setattr(sealed_folder, "_seal", full)
    recipe = [*tiny, "checkpoint_every=2", f"run_dir={tmp_path}/run"]
    code, _, err = sltrain_train(*recipe)
    assert code == 2 and "No space left" in err
    assert newest(tmp_path / "run").name == "step_00000002"
    monkeypatch.undo()
    assert sltrain_train(*recipe)[0] == 0


def test_diverging_run_stops_with_advice(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    code, out, _ = sltrain_train(*tiny, "max_steps=40", "lr=1e30", "warmup_steps=0", f"run_dir={tmp_path}/run")
    assert code == 5
    assert "not finite" in out and "grad_clip=1.0" in out
    last, stopped = metrics_of(tmp_path / "run")[-2:]
    assert last["num_skipped_updates"] == 10 and stopped["outcome"] == "diverged"


def test_tracker_wandb_records_offline(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, out, _ = sltrain_train(*tiny, "tracker=wandb", "max_steps=2", "warmup_steps=0", f"run_dir={tmp_path}/run")
    assert code == 0
    assert "wandb" in out.lower()
    assert (tmp_path / "run" / "wandb_id").read_text().strip()
    assert list((tmp_path / "run").glob("wandb/*/*.wandb"))


def test_eight_bit_adam_and_bfloat16(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    code, out, _ = sltrain_train(
        *tiny, "optimizer=adam8bit", "dtype=bfloat16", "max_steps=2", "warmup_steps=0", f"run_dir={tmp_path}/run"
    )
    assert code == 0 and "bfloat16" in out
    weights = load_file(newest(tmp_path / "run") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.uint16}


def test_checkpointing_and_one_large_pass_train_the_same(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    """Activation checkpointing and the split into micro-batches do not change the mathematics."""
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/a")[0] == 0
    assert sltrain_train(*tiny, "activation_checkpointing=true", "micro_batch_size=8", f"run_dir={tmp_path}/b")[0] == 0
    for a, b in zip(metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_validation_text_that_is_missing_ends_the_run_before_it_begins(
    tiny: list[str], tmp_path: Path, sltrain_train: Run
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    code, _, err = sltrain_train(*tiny, f"validation_path={tmp_path}/empty.jsonl", f"run_dir={tmp_path}/run")
    assert code == 2 and "validation" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_data_that_breaks_in_the_middle_saves_what_was_trained(
    num_ranks: int, tiny: list[str], corpus: Path, tmp_path: Path, fork_train: Start, metrics_of: Metrics
) -> None:
    """on_bad_data=stop: the steps before the bad record are kept on every rank, without a traceback."""
    words = " ".join(f"word{i}" for i in range(40))
    lines = [json.dumps({"text": f"{i} {words}"}) for i in range(400)]
    lines[300] = '{"text": '
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    process = fork_train(
        *tiny,
        f"path={tmp_path}/corpus.jsonl",
        f"validation_path={corpus}/train.00000.json.gz",
        "on_bad_data=stop",
        "max_steps=200",
        "micro_batch_size=2",
        "data.shuffle_block=4",
        f"run_dir={tmp_path}/run",
        num_ranks=num_ranks,
    )
    out, err = process.communicate(timeout=120)
    assert "corpus.jsonl:301" in err and "saved at step" in out, out + err
    assert "sltrain/" not in err, err  # no traceback through our files
    if num_ranks == 1:
        assert process.returncode == 2
    saved, stopped = metrics_of(tmp_path / "run")[-2:]
    assert saved["event"] == "checkpoint" and saved["step"] == stopped["step"] > 0
    assert stopped["outcome"] == "data lost"


def test_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    tiny: list[str], tmp_path: Path, sltrain_train: Run
) -> None:
    run = [*tiny, "checkpoint_every=2", f"run_dir={tmp_path}/run"]
    assert sltrain_train(*run)[0] == 0
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").glob("step_*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, _, err = sltrain_train(*run)
    assert code == 2 and "no checkpoint" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_first_batch_that_fails_leaves_the_folder_free_for_another_try(
    tiny: list[str], corpus: Path, tmp_path: Path, sltrain_train: Run
) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one document for eight streams"}\n')
    run = [*tiny, f"path={tmp_path}/few.jsonl", f"validation_path={corpus}/*.gz", f"run_dir={tmp_path}/run"]
    code, out, err = sltrain_train(*run)
    assert code == 2 and "data.num_streams" in err and "no update was made" in out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert sltrain_train(*run, "data.num_streams=1")[0] == 0
