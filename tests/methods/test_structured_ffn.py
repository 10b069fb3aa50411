"""method=structured_ffn: an independent rewrite with and without a guide, what is counted and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planned import is_as_planned
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.building.model import build_model
from sltrain.building.phases import structures
from sltrain.compose import TRAIN, compose_config
from sltrain.layers import blocks
from sltrain.methods.structured_ffn import STRUCTURES
from sltrain.planning.accounting import count_parameters


class Structured(nn.Module):
    """x W^T with W from einsums over the blocks of the paper, and a guide beside it while there is one."""

    def __init__(self, own: Weights, kind: str, blocks: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(own["A"].clone()), nn.Parameter(own["B"].clone())
        self.kind, self.blocks, self.g = kind, blocks, 0.0
        if "guide" in own:
            self.guide = nn.Parameter(own["guide"].clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.structured(x)
        return self.g * (x @ self.guide.t()) + (1 - self.g) * y if hasattr(self, "guide") else y

    def structured(self, x: Tensor) -> Tensor:
        if self.kind == "low_rank":
            return x @ self.A.t() @ self.B.t()
        k = self.blocks
        h = torch.einsum("kqp,nkp->nkq", self.A.unflatten(0, (k, -1)), x.unflatten(1, (k, -1))).flatten(1)
        if self.kind == "block_dense":
            return h @ self.B.t()
        dealt = torch.stack([h[:, block::k] for block in range(k)], dim=1)  # (n, l, r)
        return torch.einsum("lsr,nlr->nsl", self.B.unflatten(0, (k, -1)), dealt).flatten(1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    kind: str, guided: bool, tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    options = [f"method.structure={kind}", "method.blocks=2", f"method.guided={guided}", "method.dense_layers=0"]
    overrides = [*tiny, "method=structured_ffn", *options, "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    modules: list[Structured] = []

    def make(name: str, own: Weights) -> nn.Module | None:
        if "A" not in own:
            return None
        modules.append(Structured(own, kind, 2))
        modules[-1].g = 0.5 * (1 + math.cos(math.pi / 10))
        return modules[-1]

    def after(step: int, model: nn.Module) -> None:
        for module in modules:
            module.g = 0.5 * (1 + math.cos(math.pi * (step + 1) / 10))
            if step == 10 and guided:
                del module.guide

    theirs = rewrite(overrides, run, make, after)
    assert len(modules) == 6
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5
    names = [run.saved(step).keys() for step in (9, 10)]
    assert [sum(name.endswith("guide") for name in found) for found in names] == [6 * guided, 0]


def test_parameters_are_those_of_the_formulas() -> None:
    d, i, r, b = 512, 1376, 128, 4
    base = ["model=llama_60m", "method=structured_ffn", f"rank={r}", "method.guided=true"]
    dense = count_parameters(
        build_model(compose_config(["model=llama_60m", "method=full"], TRAIN), 32_000, torch.float32)
    )
    for kind, of_one in {
        "low_rank": 3 * r * (d + i),
        "block_dense": 2 * (r * d // b + r * i) + r * i // b + r * d,
        "block_shuffle": 3 * d * (d + i) // b,
    }.items():
        config = compose_config([*base, f"method.structure={kind}"], TRAIN)
        (first, guided), (second, alone) = structures(config, build_model(config, 32_000, torch.float32))
        assert (first, second) == ("guide for 5500", "structured alone")
        counts, later = count_parameters(guided), count_parameters(alone)
        assert counts["low_rank"] == later["low_rank"] == 7 * of_one, kind  # one of 8 layers is dense
        assert counts["total"] == dense["total"] + 7 * of_one
        assert later["total"] == dense["total"] - 7 * 3 * d * i + 7 * of_one


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRUCTURES)
def test_memory_without_a_guide_is_as_planned(
    kind: str, tiny: list[str], sltrain_train: Callable, metrics_of: Callable, tmp_path: Path
) -> None:
    options = ["method=structured_ffn", f"method.structure={kind}", "method.dense_layers=0"]
    is_as_planned([*tiny, *options], sltrain_train, metrics_of, tmp_path / "run")


@pytest.mark.slow
def test_more_updates_than_a_guide_was_promised_are_refused(
    tiny: list[str], sltrain_train: Callable, tmp_path: Path
) -> None:
    """Also where the learning rate would allow them: the guide would have counted otherwise."""
    options = ["method=structured_ffn", "method.guided=true", "schedule=constant", "max_steps=4"]
    assert sltrain_train(*tiny, *options, f"run_dir={tmp_path}/run")[0] == 0
    code, _, err = sltrain_train(f"run_dir={tmp_path}/run", "extend=4")
    assert code == 2 and "extend=4" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method.structure=monarch", "method.structure=monarch: choose one of low_rank, block_dense, block_shuffle"),
        ("rank=0", "method.rank=0: must be at least 1"),
        ("method.blocks=0", "method.blocks=0: must be at least 1"),
        ("method.guide_share=0", "method.guide_share=0.0: must be above 0 and at most 1"),
        ("method.dense_layers=-1", "method.dense_layers=-1: must be at least 0"),
        ("method.gain=0", "method.gain=0.0: must be a number above 0"),
    ],
)
def test_wrong_options_cost_one_line(options: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        compose_config(["model=llama_60m", "method=structured_ffn", *options.split()], TRAIN)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "method.structure=block_shuffle method.blocks=3",
            "layers.1.mlp.gate_proj: blocks=3 does not divide in_f",
        ),
        ("rank=40", "layers.1.mlp.gate_proj: rank must be between 1 and 32"),
        ("method.dense_layers=2", "method.dense_layers=2 leaves no MLP to structure; choose fewer"),
    ],
)
def test_shapes_that_do_not_fit_are_named(options: str, message: str, tiny: list[str]) -> None:
    config = compose_config([*tiny, "method=structured_ffn", *options.split()], TRAIN)
    with pytest.raises(ValueError, match=message):
        build_model(config, 512, torch.float32)


def test_the_method_knows_the_structures_of_the_layer() -> None:
    assert STRUCTURES == blocks.STRUCTURES
