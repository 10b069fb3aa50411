"""Memory through the command: what is planned and measured, updates inside backward, the guard, and running out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sltrain.api.report import count_parameters_of, read_rows
from sltrain.building import memory_guard
from sltrain.models.llama import LlamaForCausalLM

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict]]
Start = Callable[..., Any]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train_lines(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["event"] == "train"]


@pytest.fixture
def large(tiny: list[str]) -> list[str]:
    """Large enough that tensors of a few bytes, which no plan counts, do not show."""
    return [*tiny, "model.hidden_size=128", "model.intermediate_size=352", "rank=16", "seq_len=128", "max_steps=3"]


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["method=full", "micro_batch_size=8", "activation_checkpointing=true"],
        ["per_layer_update=true"],
        ["per_layer_update=true", "micro_batch_size=8", "optimizer=adam8bit"],
    ],
)
def test_measured_is_what_was_planned(
    how: list[str], large: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    code, out, err = sltrain_train(*large, *how, f"run_dir={tmp_path}/run")
    assert code == 0, err
    assert "planned for tensors" in out and "measured for tensors" in out
    first, second, *later = [line for line in metrics_of(tmp_path / "run") if line["event"] in ("train", "final")]
    assert "peak_tensor_bytes" not in first | second  # the first update still makes the optimizer's state
    assert len(later) == 2
    for line in later:
        assert line["peak_tensor_bytes"] == pytest.approx(line["planned_memory_bytes"], rel=0.05)


def test_each_phase_is_measured_and_the_report_has_its_highest_memory_and_last_parameters(
    large: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    """Adapters join slope's sparse weights for the second half."""
    how = ["method=slope", "method.adapter_share=0.5", "max_steps=8", f"run_dir={tmp_path}/run"]
    code, out, err = sltrain_train(*large, *how)
    assert code == 0, err
    assert out.count("measured for tensors") == 2
    peaks = {line["step"]: line["peak_tensor_bytes"] for line in train_lines(metrics_of(tmp_path / "run"))[2:]}
    assert peaks[3] == peaks[6] < peaks[7] == peaks[8]
    final = metrics_of(tmp_path / "run")[-1]
    assert peaks[8] == final["peak_tensor_bytes"] == pytest.approx(final["planned_memory_bytes"], rel=0.05)
    (row,), _ = read_rows([tmp_path / "run"])
    assert (row.peak_tensor_bytes, row.num_parameters) == (peaks[8], final["num_parameters"]["total"])
    assert row.peak_memory_bytes == final["peak_memory_bytes"]
    assert count_parameters_of(tmp_path / "run", 3) < count_parameters_of(tmp_path / "run", 4) == row.num_parameters


def test_updates_inside_backward_make_the_ordinary_run(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    """Bit for bit, over several micro-batches and a checkpoint that the other kind of run continues."""
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/plain")[0] == 0
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/inside", "per_layer_update=true")[0] == 0
    assert_equal_weights(tmp_path / "plain", tmp_path / "inside")
    assert all(line["num_skipped_tensors"] == 0 for line in train_lines(metrics_of(tmp_path / "inside")))
    norms = [
        [line["grad_norm"] for line in metrics_of(tmp_path / name) if line["event"] == "train"]
        for name in ("plain", "inside")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_run_that_updates_inside_backward_continues_exactly(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = [*tiny, "per_layer_update=true", "checkpoint_every=2"]
    assert sltrain_train(*how, f"run_dir={tmp_path}/straight")[0] == 0
    with monkeypatch.context() as patch:
        run_out_in_update(4, patch)
        assert sltrain_train(*how, f"run_dir={tmp_path}/cut")[0] == 2
    assert sltrain_train(*how, f"run_dir={tmp_path}/cut")[0] == 0
    assert_equal_weights(tmp_path / "straight", tmp_path / "cut")


def test_two_ranks_that_update_inside_backward_train_the_curve_of_one(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, fork_train: Start, metrics_of: Metrics
) -> None:
    process = fork_train(*tiny, "per_layer_update=true", f"run_dir={tmp_path}/two", num_ranks=2)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert "profiling" not in err  # the profiler's remarks
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/one")[0] == 0
    losses = [
        [line["loss"] for line in metrics_of(tmp_path / name) if line["event"] == "train"] for name in ("two", "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- the guard


def test_what_does_not_fit_is_refused_before_anything_is_written(
    large: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 12_000_000)
    code, _, err = sltrain_train(*large, f"run_dir={tmp_path}/run")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "12.0 MB are free" in err and "what would fit: micro_batch_size=2" in err and "memory_guard=off" in err
    assert not (tmp_path / "run").exists()
    # and it does fit
    assert sltrain_train(*large, f"run_dir={tmp_path}/run", "micro_batch_size=2")[0] == 0


def test_nothing_that_fits(large: list[str], sltrain_train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 1_000_000)
    code, _, err = sltrain_train(*large)
    assert code == 2 and "what would fit: a smaller model" in err


def test_the_guard_can_be_switched_off(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: 1_000)
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/run", "memory_guard=off", "max_steps=1", "warmup_steps=0")[0] == 0


# ---- running out


def run_out_in_update(update: int, patch: pytest.MonkeyPatch, passes_per_update: int = 2) -> None:
    """Let the allocator be asked for more than there is, in the last forward pass of an update."""
    forward, count = LlamaForCausalLM.forward, 0

    def hungry(self: LlamaForCausalLM, *args: Any, **how: Any) -> torch.Tensor:
        nonlocal count
        count += torch.is_grad_enabled()
        if torch.is_grad_enabled() and count == update * passes_per_update:
            torch.empty(10**15)
        return forward(self, *args, **how)

    patch.setattr(LlamaForCausalLM, "forward", hungry)


def test_running_out_saves_and_says_what_was_planned(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/straight")[0] == 0
    with monkeypatch.context() as patch:
        run_out_in_update(4, patch)
        code, _, err = sltrain_train(*tiny, f"run_dir={tmp_path}/cut")
    assert code == 2 and "Traceback" not in err and err.count("error: ") == 1
    assert "out of memory after step 3" in err and "MB were planned" in err and "step 3 is saved" in err
    assert "micro_batch_size below 4" in err and "activation_checkpointing=true" in err
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/cut")[0] == 0
    assert_equal_weights(tmp_path / "straight", tmp_path / "cut")


@pytest.mark.parametrize("how", ["per_layer_update=true", "optimizer=adamw"])
def test_weights_that_are_half_updated_are_not_saved(
    how: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out in the middle of the fourth update's changes to the weights, after a checkpoint at step 2."""
    step, count = torch.optim.AdamW.step, 0

    def hungry(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        step(self, *args, **kwargs)
        num_parameters = len(self.state)
        if count == (3 * num_parameters + 5 if how.startswith("per_layer") else 4):
            torch.empty(10**15)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", hungry)
        code, _, err = sltrain_train(*tiny, how, "checkpoint_every=2", f"run_dir={tmp_path}/run")
    assert code == 2 and "step 2 is saved" in err
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000002"]
    assert sltrain_train(*tiny, how, "checkpoint_every=2", f"run_dir={tmp_path}/run")[0] == 0
    assert sltrain_train(*tiny, f"run_dir={tmp_path}/straight")[0] == 0
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")
