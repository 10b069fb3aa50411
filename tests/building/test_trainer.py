"""What a trainer built from a configuration does where a rank, a phase or a checkpoint is in its way."""

import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_equal, stopped_at
from safetensors.torch import load_file
from torch import nn

from sltrain.api.plan import build_plan
from sltrain.api.plan_config import PLAN, Asked
from sltrain.api.train import train_run
from sltrain.building import trainer
from sltrain.building.model import build_model
from sltrain.building.phases import Live
from sltrain.compose import TRAIN, compose_config
from sltrain.config_checks import validate
from sltrain.engine.actions import Phase
from sltrain.engine.distributed import Ranks
from sltrain.engine.strategy import Single
from sltrain.layers import SLTrainLinear, replace_linears
from sltrain.methods.base import METHODS, Method
from sltrain.methods.full import Full
from sltrain.parameters import ParamInfo
from sltrain.planning.roles import parameters_of

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]


def test_a_rank_that_cannot_read_the_checkpoint_ends_all_with_its_line(
    tiny: list[str],
    tmp_path: Path,
    sltrain_train: Run,
    fork_train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = [*tiny, "micro_batch_size=2", "checkpoint_every=3", "keep_last=9"]
    assert sltrain_train(*run, f"run_dir={tmp_path}/straight")[0] == 0
    stopped = stopped_at(tmp_path / "straight", 3, tmp_path / "stopped")
    before = (stopped / "metrics.jsonl").read_bytes()
    restore = trainer.restore

    def fails_on_one(*arguments: Any) -> dict[str, Any]:
        if os.environ.get("RANK") == "1":
            raise OSError(5, "Input/output error", "model.safetensors")
        return restore(*arguments)

    monkeypatch.setattr(trainer, "restore", fails_on_one)
    process = fork_train(*run, f"run_dir={stopped}", num_ranks=2)
    out, err = process.communicate()
    assert process.returncode == 2 and "resume " not in out
    assert err == "[rank 1] error: [Errno 5] Input/output error: 'model.safetensors'\n"
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def late() -> Iterator[None]:
    """A method whose q_proj are SLTrain layers, and from update 3 on down_proj too."""

    def put(model: nn.Module, leaf: str) -> list[str]:
        def make(name: str, linear: nn.Linear) -> nn.Module:
            sizes = linear.in_features, linear.out_features
            return SLTrainLinear(*sizes, 4, 0.1, 8, device=linear.weight.device, dtype=linear.weight.dtype)

        return replace_linears(model, lambda name, linear: name.endswith(leaf), make)

    def start(model: nn.Module, generator: torch.Generator) -> None:
        for name, module in model.named_modules():
            if name.endswith("down_proj"):
                module.reset_parameters(generator)

    @METHODS.register("late")
    @dataclass
    class Late(Method):
        def replace(self, model: nn.Module, chosen: Any) -> list[str]:
            return put(model, "q_proj")

        def phases(self, max_steps: int) -> list[Phase]:
            return [Phase("down", 3, lambda model: put(model, "down_proj") and None, start)]

    yield
    METHODS._classes.pop("late")


@pytest.mark.usefixtures("late")
def test_layers_that_join_keep_their_paths_when_the_run_continues(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*tiny, "method=late", "checkpoint_every=1", "keep_last=9"]
    straight = tmp_path / "straight"

    def paths(folder: Path, step: int) -> dict[str, str]:
        state = json.loads((folder / f"checkpoints/step_{step:08d}/state.json").read_text())
        return state["arithmetic"]["layer_paths"]

    monkeypatch.setattr("sltrain.layers.cost.choose_path", lambda *shape: "composed")
    code, _, err = sltrain_train(*run, f"run_dir={straight}")
    assert code == 0, err
    names = {leaf: {f"model.layers.{i}.{leaf}" for i in (0, 1)} for leaf in ("self_attn.q_proj", "mlp.down_proj")}
    assert paths(straight, 2) == dict.fromkeys(names["self_attn.q_proj"], "composed")
    assert paths(straight, 3) == dict.fromkeys(set.union(*names.values()), "composed")
    monkeypatch.setattr("sltrain.layers.cost.choose_path", lambda *shape: "factored")
    stopped = stopped_at(straight, 4, tmp_path / "stopped")
    assert sltrain_train(*run, f"run_dir={stopped}")[0] == 0
    assert paths(stopped, 6) == paths(straight, 3)
    files = [folder / "checkpoints/step_00000006/model.safetensors" for folder in (straight, stopped)]
    assert_equal(*map(load_file, files))


def test_nothing_changes_the_configuration_it_is_given(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "max_steps=1", "warmup_steps=0", "model.vocab_size=512", f"run_dir={tmp_path}/run"]
    config = compose_config(overrides, TRAIN)
    before = deepcopy(config)
    build_plan(compose_config(["measure=true"], PLAN), [Asked(config)])
    build_plan(compose_config(["paper_convention=true"], PLAN), [Asked(config)])
    train_run(config)
    assert config == before


def test_roles_and_the_method_scale_the_learning_rate(tiny: list[str]) -> None:
    """lr x schedule x the method's factor of the step x its factor of the parameter x that of the role."""

    class Restarted(Full):
        def lr_factor(self, step: int, max_steps: int) -> float:
            return 0.5 if step == 3 else 1.0

        def group_options(self, parameter: ParamInfo) -> dict[str, float]:
            return {"lr_scale": 3.0} if parameter.role == "embedding" else {}

    typed = ["method=full", "lr=0.1", "schedule=constant", "warmup_steps=0", "lr_scale={embedding: 2, gain: 0.5}"]
    config = compose_config([*tiny, *typed], TRAIN)
    config.method = Restarted(name="full")
    model = build_model(config, 512, torch.float32)
    optimizer = trainer.build_updates(config, model, Single(Ranks(0, 1, torch.device("cpu"))))
    set_rate = trainer.learning_rate_setter(config, Live(optimizer))

    def rates() -> dict[str, float]:
        infos = parameters_of(model)
        return {infos[name].role: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}

    assert set_rate(2) == 0.1
    assert rates() == pytest.approx({"embedding": 0.6, "head": 0.1, "projection": 0.1, "gain": 0.05})
    assert set_rate(3) == 0.05
    assert rates()["embedding"] == pytest.approx(0.3)


@pytest.mark.parametrize(("typed", "said"), [("{wheel: 2}", "no parameter has this role"), ("{head: 0}", "above 0")])
def test_an_unknown_role_or_a_factor_of_zero_is_one_line(tiny: list[str], typed: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(compose_config([*tiny, f"lr_scale={typed}"], TRAIN))
