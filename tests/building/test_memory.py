"""Building, loading and fitting: no second copy of a model, and advice that holds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sltrain
from sltrain.building import memory_guard
from sltrain.building.checks import check_before_text, check_changed
from sltrain.building.memory import plan_model, settings_that_fit
from sltrain.building.model import allocate, build_model
from sltrain.building.trainer import build_updates, stateful_optimizer
from sltrain.compose import TRAIN, compose_config
from sltrain.config import TrainConfig
from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.memory import bytes_of, held_by, tensor_peak
from sltrain.engine.strategy import Replicated, Single
from sltrain.log import memory_size
from sltrain.planning.memory_plan import MemoryPlan
from sltrain.planning.sharding import Sharding
from sltrain.runs.run_folder import RunFolder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def composed(*overrides: str) -> TrainConfig:
    return compose_config([*overrides, "data=stdlib"], TRAIN)


def objects_of(updates: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Stateful]:
    return {"optimizer": stateful_optimizer(updates, model)}


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
def test_building_and_loading_hold_no_second_copy(optimizer: str, tmp_path: Path) -> None:
    """At most 1.1 times the model's own bytes and its largest layer; loading, with the optimizer's state."""
    config = composed("model=llama_60m", f"optimizer={optimizer}", "model.num_hidden_layers=4")

    def build() -> torch.nn.Module:
        model = build_model(config, 32_000, torch.bfloat16)
        allocate(model, CPU)
        model.init_weights(1)
        return model

    model, peak = tensor_peak(build, 0, CPU)
    own = bytes_of([*model.parameters(), *model.buffers()])
    largest = max(bytes_of(module.parameters(recurse=False)) for module in model.modules())
    assert own < peak <= 1.1 * own + largest

    updates = build_updates(config, model, Single(Ranks(0, 1, CPU)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updates.step()
    updates.zero_grad()
    held = held_by(model, updates)
    path, saving = tensor_peak(
        lambda: Checkpointer(tmp_path, 1).write(Contents.of(1, model, objects_of(updates, model), {})), held, CPU
    )
    assert saving <= 1.1 * held + largest
    other = build_model(config, 32_000, torch.bfloat16)
    allocate(other, CPU)
    other_updates = build_updates(config, other, Single(Ranks(0, 1, CPU)))
    _, loading = tensor_peak(
        lambda: Checkpointer(tmp_path, 1).load(path, other, objects_of(other_updates, other)), own, CPU
    )
    assert held <= loading <= 1.1 * held + largest


def refuses_nothing(config: TrainConfig) -> None:
    """What a start would say of a change."""


def plan_of(config: TrainConfig) -> MemoryPlan:
    return plan_model(config, build_model(config, 32_000, torch.bfloat16), CUDA, 1)


@pytest.mark.parametrize("share", [0.95, 0.4])
def test_advice_fits_and_is_needed(share: float) -> None:
    config = composed("model=llama_350m", "global_batch_size=8", "micro_batch_size=8", "grad_clip=1.0")
    free = int(share * plan_of(config).total_bytes)
    found = settings_that_fit(config, plan_of, free)
    assert found is not None
    typed, plan = found
    base = ["model=llama_350m", "global_batch_size=8", "micro_batch_size=8", "grad_clip=1.0"]

    def total(texts: list[str]) -> int:
        keys = {text.partition("=")[0] for text in texts}
        kept = [text for text in base if text.partition("=")[0] not in keys]
        return plan_of(composed(*kept, *texts)).total_bytes

    assert total(typed.split()) == plan.total_bytes <= free
    for text in typed.split():
        others = [other for other in typed.split() if other != text]
        if not text.startswith("grad_clip"):  # those go along with per_layer_update
            assert total(others) > free, f"{text} is not needed"


def test_the_headline_run_is_found_for_a_small_card() -> None:
    found = settings_that_fit(composed("model=llama_7b"), plan_of, 16 * 10**9)
    assert found is not None and "per_layer_update=true" in found[0] and "global_batch_size=" in found[0]
    assert found[1].total_bytes < 16 * 10**9
    on_resume = settings_that_fit(composed("model=llama_7b"), plan_of, 16 * 10**9, keys=["micro_batch_size"])
    assert on_resume is None


def test_no_advice_where_nothing_helps() -> None:
    config = composed("model=llama_7b", "optimizer=adam8bit")
    assert settings_that_fit(config, plan_of, 10**9) is None


@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_of_one_machine_share_its_memory(
    num_processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    """What fits one process does not fit two; torchrun says how many there are here."""
    config = composed("model=llama_tiny", "max_steps=10", "device=cpu")
    strategy = Single(Ranks(0, 1, CPU))
    model = build_model(config, 1000, torch.float32)
    planned = plan_model(config, model, CPU, 1).total_bytes
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: int(1.5 * planned))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))

    def guard() -> MemoryPlan | None:
        return memory_guard.guard_memory(config, model, RunFolder(tmp_path / "run"), strategy, refuses_nothing)

    if num_processes == 1:
        assert guard() == plan_model(config, model, CPU, 1)
    else:
        with pytest.raises(ValueError, match=f"where {memory_size(int(0.75 * planned))} are free"):
            guard()
    assert f"{memory_size(int(1.5 * planned / num_processes))} free on cpu" in lines[0]


def test_copies_of_a_run_on_a_gpu_are_in_the_memory_of_its_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    """Rank 0's: weights, positions and both moments of every value, and no share of the card's memory."""
    how = ["model=llama_60m", "device=cuda", "dtype=bfloat16"]
    config, without = composed(*how, "checkpoint_async=true"), composed(*how)
    model = build_model(config, 32_000, torch.bfloat16)
    assert plan_model(config, model, CUDA, 1) == (plan := plan_model(without, model, CUDA, 1))
    copied = sum(p.nbytes for p in model.buffers()) + sum(3 * p.nbytes for p in model.parameters())
    free = {"cuda": 10**12, "cpu": copied // 2}
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: free[device.type])

    def guard(config: TrainConfig, rank: int = 0, together: bool = False) -> MemoryPlan | None:
        strategy = Replicated(Ranks(rank, 2, CUDA))
        strategy.savers = strategy.ranks if together else None
        return memory_guard.guard_memory(config, model, RunFolder(tmp_path / "run"), strategy, refuses_nothing)

    with pytest.raises(
        ValueError, match=f"copies {memory_size(copied)} to the host's memory, where .* free on .*; set check"
    ):
        guard(config)
    assert lines[-1].startswith(f"memory     {memory_size(copied)} of the host for checkpoint_async=true")
    guard(config, rank=1)
    with pytest.raises(ValueError, match=f"copies {memory_size(2 * copied)} to the host's memory"):
        guard(config, rank=1, together=True)  # on another machine than rank 0, for all that it knows
    guard(without)
    guard(composed(*how, "checkpoint_async=true", "memory_guard=off"))
    free["cpu"] = 2 * copied
    guard(config)
    note = f"note: checkpoint_async=true: rank 0 takes {copied / 1e9:.3f} GB of the host's memory"
    vocabulary = {"model.vocab_size": 32_000, "device": "cuda", "dtype": "bfloat16"}
    assert note in sltrain.plan("llama_60m", checkpoint_async=True, **vocabulary).table
    assert plan.groups.keys() == plan_model(without, model, CPU, 1).groups.keys()


def test_a_run_that_would_fit_without_its_copy_is_told() -> None:
    def plan_on_cpu(config: TrainConfig) -> MemoryPlan:
        return plan_model(config, build_model(config, 32_000, torch.float32), CPU, 1)

    config = composed("model=llama_60m", "global_batch_size=2", "micro_batch_size=2", "checkpoint_async=true")
    copied = plan_on_cpu(config).groups["checkpoint_copy"]
    found = settings_that_fit(config, plan_on_cpu, plan_on_cpu(config).total_bytes - copied)
    assert found is not None and found[0] == "checkpoint_async=false"


@pytest.mark.parametrize("share", [0.9, 0.7, 0.6])
def test_an_offer_to_a_run_in_shards_is_one_that_starts(
    share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """adam8bit would need least, but does not round at random on shards."""
    how = ["model=llama_60m", "dtype=bfloat16", "stochastic_rounding=true", "seq_len=512", "global_batch_size=16"]
    how.append("micro_batch_size=8")
    config, ranks = composed(*how), Ranks(0, 2, CPU)
    strategy: Any = SimpleNamespace(
        ranks=ranks, name="fsdp", is_sharded=True, savers=None, settings=SimpleNamespace(replicas=1)
    )
    model = build_model(config, 32_000, torch.bfloat16)
    needed = plan_model(config, model, CPU, 2, Sharding(2, reduced_element=4)).total_bytes
    monkeypatch.setattr(memory_guard, "free_bytes", lambda device: int(2 * share * needed))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"the run needs {memory_size(needed)} on cpu") as raised:
        memory_guard.guard_memory(
            config, model, RunFolder(tmp_path / "run"), strategy, lambda changed: check_changed(changed, ranks)
        )
    offer = str(raised.value).partition("what would fit: ")[2].partition(" (")[0]
    assert not offer.startswith("a smaller model")
    keys = [text.partition("=")[0] for text in offer.split()]
    kept = [text for text in how if text.partition("=")[0] not in keys]
    check_before_text(composed(*kept, *offer.split(), "parallel=fsdp", f"run_dir={tmp_path}/run"), ranks)
