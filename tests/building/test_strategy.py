"""parallel= says how processes share a model; what cannot work costs a line that names key, value and remedy."""

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir

from sltrain.building import strategy as module
from sltrain.building.model import build_model
from sltrain.building.start_from import Start
from sltrain.building.strategy import against_shards, build_strategy, check_parallel, check_sharding, compare_ranks
from sltrain.building.trainer import give_memory
from sltrain.compose import conf_dir, register_schema, to_train_config
from sltrain.config import TrainConfig
from sltrain.config_checks import validate
from sltrain.engine.distributed import Ranks
from sltrain.engine.strategy import Single
from sltrain.models.llama import LlamaForCausalLM

CPU = torch.device("cpu")


def composed(*overrides: str) -> TrainConfig:
    register_schema()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_train_config(compose("train", ["model=llama_tiny", "max_steps=10", *overrides]))


def model_of(config: TrainConfig) -> LlamaForCausalLM:
    return build_model(config, 100, torch.float32)


@pytest.mark.parametrize(
    ("overrides", "world_size", "text"),
    [
        (["parallel=single"], 2, "parallel=single is for one process, and there are 2"),
        (["parallel=fsdp", "parallel.replicas=2"], 4, "parallel.replicas=2 is for parallel=hsdp, and parallel is fsdp"),
        (["parallel=hsdp", "parallel.replicas=3"], 4, "set parallel.replicas to one of 1, 2, 4"),
        (
            ["parallel=ddp", "parallel.param_dtype=bfloat16"],
            2,
            "parallel.param_dtype=bfloat16 is for parallel=fsdp",
        ),
        (["parallel=single", "parallel.reshard_after_forward=false"], 1, "or drop parallel.reshard_after_forward"),
        (["parallel=ddp", "parallel.checkpoint=sharded"], 2, "is for parallel=fsdp and hsdp, and parallel is ddp"),
    ],
)
def test_processes_that_cannot_share_so(overrides: list[str], world_size: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_parallel(composed(*overrides), world_size)


@pytest.mark.parametrize("overrides", [["parallel=hsdp", "parallel.replicas=2"], ["parallel=fsdp"], ["parallel=ddp"]])
def test_processes_that_can(overrides: list[str]) -> None:
    check_parallel(composed(*overrides), 4)


def test_hsdp_has_a_copy_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert module.num_replicas(composed("parallel=hsdp"), 8) == 2
    assert module.num_replicas(composed("parallel=fsdp"), 8) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "zero3"),
        ("param_dtype", "float16"),
        ("reduce_dtype", "fp32"),
        ("reduce_every", "step"),
        ("checkpoint", "dcp"),
        ("replicas", 0),
    ],
)
def test_unknown_values(key: str, value: Any) -> None:
    config = composed("parallel=hsdp")
    changed = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **{key: value}))
    with pytest.raises(ValueError, match=f"parallel.{key}={value}: "):
        validate(changed)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["dtype=bfloat16", "stochastic_rounding=true", "optimizer=lion"], "set optimizer=adamw"),
        (["method=int8"], "method=int8 holds weights as codes"),
        (["method=relora"], "method=relora changes whole matrices between updates"),
        (["method.restart_every=5"], "set method=sltrain, low_rank, full or cola without restarts"),
    ],
)
def test_what_shards_refuse(overrides: list[str], text: str) -> None:
    config = composed("parallel=fsdp", *overrides)
    with pytest.raises(ValueError, match=f"parallel=fsdp: .*{text}.*, or parallel=ddp"):
        check_sharding(config, model_of(config), 2)
    check_sharding(config, model_of(config), 1)  # one process holds all of it


@pytest.mark.parametrize(
    "overrides",
    [["method=sltrain"], ["method=full", "optimizer=muon"], ["method=low_rank", "optimizer=adam8bit"], ["method=cola"]],
)
def test_what_works_on_shards(overrides: list[str]) -> None:
    for more in (["ema=0.9", "grad_clip=1"], ["compile=true"], ["per_layer_update=true", "grad_clip=null"]):
        config = composed(*overrides, *more)
        assert against_shards(config, model_of(config)) is None


def test_auto_is_the_same_on_all_ranks_where_plans_differ(
    monkeypatch: pytest.MonkeyPatch, on_two_ranks: Callable[..., list[Any]]
) -> None:
    """As on machines of which one has no kernel."""
    config = composed()

    def chosen(ranks: Ranks) -> str:
        plan = SimpleNamespace(total_bytes=100 + 100 * ranks.rank)
        monkeypatch.setattr(module, "plan_model", lambda *args: plan)
        monkeypatch.setattr(module, "free_share", lambda ranks: 150)
        return module._choose(config, model_of(config), ranks)

    assert on_two_ranks(chosen) == ["ddp", "ddp"]


def test_auto_is_ddp_while_the_plan_fits(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """The memory of the process with least decides. What shards refuse stays with ddp."""
    config, ranks = composed(), Ranks(0, 4, CPU)
    monkeypatch.setattr(Ranks, "on_main", lambda self, make: make())
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, None, 10**6])
    model = model_of(config)
    assert module._choose(config, model, ranks) == "fsdp" and "parallel   fsdp" in lines[-1]
    refused = composed("method=relora")
    assert module._choose(refused, model_of(refused), ranks) == "ddp" and "would need a change" in lines[-1]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [10**12, 10**11])
    assert module._choose(config, model, ranks) == "ddp"


def test_auto_is_what_it_was_when_a_run_continues(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """On as many processes, whatever memory is free now."""
    config, ranks = composed(), Ranks(0, 2, CPU)
    model = model_of(config)
    monkeypatch.setattr(module, "_choose", lambda *_: pytest.fail("it was chosen anew"))
    assert build_strategy(config, model, ranks, {"name": "ddp", "num_processes": 2}).name == "ddp"
    assert "ddp, as before on 2 processes; parallel=fsdp would change it" in lines[-1]
    assert module._kept({"name": "fsdp", "num_processes": 2}, ranks) == "fsdp"
    for earlier in (None, {"name": "fsdp", "num_processes": 4}, {"name": "hsdp", "num_processes": 2}):
        assert module._kept(earlier, ranks) is None


def test_weights_that_machines_fit_differently_are_those_of_rank_0_before_they_are_cut(
    on_two_ranks: Callable[..., list[Any]],
) -> None:
    class Fitted:
        def fill(self, model: LlamaForCausalLM, ranks: Ranks, micro_batch_size: int) -> None:
            torch.nn.init.constant_(model.lm_head.weight, ranks.rank)

    def cut(ranks: Ranks) -> float:
        config = composed("parallel=fsdp", "model.num_hidden_layers=1")
        model, start = model_of(config), cast(Start, Fitted())
        strategy = build_strategy(config, model, ranks)
        give_memory(config, model, strategy, is_new=True, start=start)
        return float(dict(strategy.named_parameters(model))["lm_head.weight"].mean())

    assert on_two_ranks(cut) == [0.0, 0.0]


def test_shards_are_of_one_matrix_where_machines_factorize_differently(
    on_two_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eigenvectors have no sign: with those of another machine a process would hold rows of another A and B."""
    config = composed("parallel=fsdp", "method=lost", "model.num_hidden_layers=1")
    whole = model_of(config)
    give_memory(config, whole, Single(Ranks(0, 1, CPU)), is_new=True, start=None)
    eigh = torch.linalg.eigh

    def cut(ranks: Ranks) -> list[bool]:
        if ranks.rank == 1:
            monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
        model = model_of(config)
        strategy = build_strategy(config, model, ranks)
        give_memory(config, model, strategy, is_new=True, start=None)
        parts = [strategy.part(parameter.detach()) for parameter in model.parameters()]
        return [torch.equal(part, p[rows or ...]) for (part, rows), p in zip(parts, whole.parameters(), strict=True)]

    assert all(itertools.chain.from_iterable(on_two_ranks(cut)))


def test_one_process_is_single_whatever_is_asked(lines: list[str]) -> None:
    config = composed("parallel=fsdp")
    assert build_strategy(config, model_of(config), Ranks(0, 1, CPU)).name == "single"
    assert "there is one" in lines[-1]


@pytest.mark.parametrize(("typed", "dtype"), [("float32", torch.float32), ("auto", None)])
def test_gradients_of_narrow_weights_are_averaged_as_asked_for(
    typed: str, dtype: torch.dtype | None, on_two_ranks: Callable[..., list[Any]]
) -> None:
    """None is for fully_shard the dtype of the gradients, which is that of the gathered weights."""
    config = composed("parallel=fsdp", "parallel.param_dtype=bfloat16", f"parallel.reduce_dtype={typed}")

    def reduced(ranks: Ranks) -> Any:
        strategy: Any = build_strategy(config, model_of(config), ranks)
        return ranks.gather(strategy.settings.reduce_dtype)[ranks.rank]  # a rank that ends early cannot be connected to

    assert on_two_ranks(reduced) == [dtype] * 2


def test_processes_with_other_settings_are_refused_on_all(on_two_ranks: Callable[..., list[Any]]) -> None:
    def compare(ranks: Ranks) -> str:
        config = composed(f"seed={ranks.rank}")
        try:
            compare_ranks(config, ranks)
        except ValueError as error:
            return str(error)
        return "nothing"

    text = "the processes differ: seed is 0 on rank 0 and 1 on rank 1; start all of them with the same command"
    assert on_two_ranks(compare) == [f"{text} and packages"] * 2
