"""method=slope: an independent rewrite across the phase, what is counted and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import is_as_planned
from resuming import resumes_bit_for_bit
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.building.model import build_model
from sltrain.building.phases import check_structures, structures, waiting_notes
from sltrain.compose import TRAIN, compose_config
from sltrain.planning.accounting import count_parameters, stored_bytes


class DoublyPruned(torch.autograd.Function):
    """x S^T; the gradient of x by S2, that of S masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sparse: Tensor, mask: Tensor, mask2: Tensor) -> Tensor:
        ctx.save_for_backward(x, sparse, mask, mask2)
        return x @ sparse.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, sparse, mask, mask2 = ctx.saved_tensors
        return grad @ (sparse * mask2), (grad.t() @ x) * mask, None, None


class Slope(nn.Module):
    """S as a dense matrix with zeros, and adapters once they are there."""

    def __init__(self, own: Weights) -> None:
        super().__init__()
        out, kept = own["values"].shape
        bits, again = (np.unpackbits(own[name].numpy(), axis=1, bitorder="little") for name in ("mask", "again"))
        self.mask = torch.from_numpy(bits[:, : 2 * kept]).bool()
        self.mask2 = torch.zeros(out, 2 * kept, dtype=torch.bool)
        self.mask2[self.mask] = torch.from_numpy(again[:, :kept]).bool().flatten()
        self.S = nn.Parameter(torch.zeros(out, 2 * kept, dtype=torch.float64))
        self.S.data[self.mask] = own["values"].flatten()

    def join(self, A: Tensor, B: Tensor) -> None:
        self.left, self.right = nn.Parameter(B), nn.Parameter(A)

    def forward(self, x: Tensor) -> Tensor:
        y = DoublyPruned.apply(x, self.S, self.mask, self.mask2)
        return y + x @ self.right.t() @ self.left.t() / len(self.right) if hasattr(self, "left") else y


def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs, also after the adapters have joined."""
    overrides = [*tiny, "method=slope", "method.adapter_share=0.3", "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)

    def after(step: int, model: nn.Module) -> None:
        weights = run.saved(step)
        joined = [name for name in weights if name.endswith("_proj.A")]
        assert len(joined) == (14 if step >= 14 else 0)
        if step == 14:
            for name in joined:
                layer, B = name.removesuffix(".A"), weights[f"{name[:-1]}B"]
                assert not B.any()
                model.get_submodule(layer).join(weights[name], B)

    theirs = rewrite(overrides, run, lambda name, own: Slope(own), after)
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


def test_values_bits_and_adapters_are_counted() -> None:
    config = compose_config(["model=llama_60m", "method=slope", "rank=32"], TRAIN)
    (_, before), (name, after) = structures(config, build_model(config, 32_000, torch.float32))
    projections = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    counts = [count_parameters(model) for model in (before, after)]
    assert name == "adapters" and [count["sparse"] for count in counts] == [projections / 2] * 2
    assert [count["low_rank"] for count in counts] == [0, 8 * 32 * (4 * 1024 + 3 * (512 + 1376))]
    assert stored_bytes(before)["mask_weights"] == projections * 1.5 / 8


@pytest.mark.parametrize(
    ("share", "max_steps", "expected"), [(0.01, 11_000, [10_890]), (0.01, 20, [19]), (1, 20, [0]), (0, 20, [])]
)
def test_adapters_join_for_the_last_updates(share: float, max_steps: int, expected: list[int]) -> None:
    method = compose_config(["model=llama_60m", "method=slope", f"method.adapter_share={share}"], TRAIN).method
    assert [phase.after for phase in method.phases(max_steps)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method.adapter_share=2", "method.adapter_share=2.0: must be between 0 and 1; it is a share of the updates"),
        ("rank=0", "method.rank=0: must be at least 1"),
        ("method.pattern=0:4", "method.pattern=0:4: write N:M with 1 <= N <= M, such as 2:4"),
        ("method.prune=size", "method.prune=size: choose one of random, magnitude"),
        ("method.gain=-1", "method.gain=-1.0: must be a number above 0"),
    ],
)
def test_wrong_options_cost_one_line(options: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        compose_config(["model=llama_60m", "method=slope", *options.split()], TRAIN)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_memory_without_adapters_is_as_planned(
    tiny: list[str], sltrain_train: Callable, metrics_of: Callable, tmp_path: Path
) -> None:
    is_as_planned([*tiny, "method=slope", "method.adapter_share=0"], sltrain_train, metrics_of, tmp_path / "run")


MUON = ["method=slope", "optimizer=muon", "method.adapter_share=0.5"]


@pytest.mark.parametrize(
    ("typed", "note"),
    [
        (MUON, "optimizer=muon takes no parameter of method=slope before its phase adapters, after update 3: until"),
        (["method=slope", "optimizer=muon", "method.adapter_share=1"], None),  # adapters from the first update on
        (["method=relora", "optimizer=muon", "method.merge_warmup=0"], None),  # its warm start has matrices
    ],
)
def test_an_optimizer_may_wait_for_a_phase_with_matrices(typed: list[str], note: str | None, tiny: list[str]) -> None:
    config = compose_config([*tiny, *typed], TRAIN)
    model = build_model(config, 512, torch.float32)
    check_structures(config, model)
    assert [line[: len(note or "")] for line in waiting_notes(config, model)] == ([] if note is None else [note])


@pytest.mark.slow
def test_muon_trains_the_adapters_and_resumes_bit_for_bit(
    tiny: list[str], sltrain_train: Callable, tmp_path: Path
) -> None:
    """Stopped before, at and after the update from which they are there."""
    resumes_bit_for_bit([*tiny, *MUON], sltrain_train, tmp_path, [2, 3, 4])
    steps = sorted((tmp_path / "straight" / "checkpoints").glob("step_*"))
    before, after = (torch.load(step / "optimizer.pt", weights_only=True) for step in (steps[1], steps[-1]))
    assert before["class"] == "AdamW" and after["class"] == "Muon + AdamW"
    (muon,) = [group for group in after["groups"] if any(name.endswith("_proj.A") for name in group["names"])]
    assert len(muon["names"]) == 28 and all("momentum" in after["state"][name] for name in muon["names"])
    values = "model.layers.0.mlp.up_proj.values"
    assert after["state"][values]["step"] == before["state"][values]["step"] + 4  # its moments went on


@pytest.mark.slow
def test_memory_with_muon_is_as_planned(
    tiny: list[str], sltrain_train: Callable, metrics_of: Callable, tmp_path: Path
) -> None:
    """In the third update, with adapters."""
    is_as_planned([*tiny, *MUON[:2], "method.adapter_share=0.75"], sltrain_train, metrics_of, tmp_path / "run")


def test_an_optimizer_that_never_takes_anything_is_refused_in_a_line(tiny: list[str], sltrain_train: Callable) -> None:
    code, _, err = sltrain_train(*tiny, "method=slope", "optimizer=muon", "method.adapter_share=0")
    assert code == 2 and "optimizer=muon takes none of the model's parameters" in err and len(err.splitlines()) == 1
