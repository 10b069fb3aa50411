"""Configuration -> columns of a plan: one a run, and beside a single run what it is usually compared with.

    parallel=fsdp                  of several processes each with a shard of the weights, if they have whole ones
    method=full                    dense training with this run's optimizer and settings
    method=full optimizer=galore   the same with GaLore (Zhao et al., arXiv 2403.03507), at this run's rank
    published SLTrain              this run with the positions of S as the published code stores them (published.py)

A column is computed from the method and the optimizer that have its name, so any of this package or another can be one,
and one that could not be trained is none: a note says why. Models are built on the meta device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from sltrain.api.plan_table import Column
from sltrain.building.memory import optimizer_state_bytes, plan_model, sharding_of, update_shape, update_temporaries
from sltrain.building.model import build_model, weight_dtype
from sltrain.building.phases import check_structures
from sltrain.building.strategy import against_shards
from sltrain.compose import with_plugin
from sltrain.config import TrainConfig
from sltrain.config_checks import NotTogether, check_together
from sltrain.layers import set_paths
from sltrain.models.llama import LlamaForCausalLM
from sltrain.optim.build import state_bytes
from sltrain.planning.accounting import count_parameters, stored_bytes
from sltrain.planning.memory_plan import plan_memory
from sltrain.planning.published import paper_groups, paper_millions, published_stored_bytes
from sltrain.planning.roles import parameters_of

PUBLISHED = "published SLTrain"
DENSE = {"method": "full"}
IN_SHARDS = ("parallel=fsdp",)
GALORE = {"method": "full", "optimizer": "galore"}


@dataclass(frozen=True)
class Setting:
    """Where and how runs are planned."""

    num_processes: int
    paper_convention: bool  # count as the paper does


def run_column(names: tuple[str, ...], config: TrainConfig, setting: Setting) -> tuple[Column, str]:
    """The column of a run, and the moment at which it needs most; none in the paper's count. Raises ValueError for a
    model that cannot be built, and NotTogether if the optimizer takes nothing of it."""
    device = plan_device(config)
    model = planned_model(config, torch.bfloat16 if setting.paper_convention else weight_dtype(config, device))
    try:
        check_structures(config, model)
    except ValueError as error:
        raise NotTogether(str(error)) from error
    num_parameters = count_parameters(model)["total"]
    if setting.paper_convention:
        groups = paper_groups(model, state_bytes(config.optimizer, parameters_of(model).values()))
        return Column(names, groups, num_parameters, str(paper_millions(model))), ""
    sharding = sharding_of(config, setting.num_processes)
    if sharding is not None and (reason := against_shards(config, model)) is not None:
        raise NotTogether(f"parallel={config.parallel.name}: {reason}")
    plan = plan_model(config, model, device, setting.num_processes, sharding)
    return Column(
        names, plan.groups, num_parameters
    ), f"{plan.stage}, in phase {plan.phase}" if plan.phase else plan.stage


def compared_columns(config: TrainConfig, setting: Setting) -> tuple[list[Column], list[str]]:
    """What to show beside a single run, and notes on what cannot be shown."""
    columns, notes = [], []
    for names, changed in _compared_runs(config, setting):
        try:
            check_together(changed)
            columns.append(run_column(names, changed, setting)[0])
        except NotTogether as error:
            notes.append(refusal(names, str(error)))
    is_cut = sharding_of(config, setting.num_processes) is not None  # the published code has no shards
    if not setting.paper_convention and not is_cut and (published := _published_column(config, setting)) is not None:
        columns.append(published)
        notes.append(
            f"{PUBLISHED}: its positions of S, of 8 bytes each, and a dense W on the way, with our activations"
        )
    return columns, notes


def refusal(names: tuple[str, ...], reason: str) -> str:
    """The note on a column that cannot be."""
    return f"no column {' '.join(names)}, sltrain-train would refuse: {reason}"


def plan_device(config: TrainConfig) -> torch.device:
    """A plan is for a card unless device=cpu is asked for."""
    return torch.device("cpu" if config.device == "cpu" else "cuda")


def _compared_runs(config: TrainConfig, setting: Setting) -> Iterator[tuple[tuple[str, ...], TrainConfig]]:
    """This run in shards, if several processes have all of its model; dense training if this run is not dense, and
    GaLore if it is not and has a rank."""
    is_whole = setting.num_processes > 1 and config.parallel.name not in ("fsdp", "hsdp")
    if is_whole and not setting.paper_convention:
        yield IN_SHARDS, replace(config, parallel=replace(config.parallel, name="fsdp"))
    for plugins in (DENSE, GALORE):
        changed = _with(config, plugins)
        is_own = (changed.method.name, changed.optimizer.name) == (config.method.name, config.optimizer.name)
        is_shown = config.rank > 0 and config.optimizer.name != "galore" if plugins is GALORE else True
        if is_shown and not is_own:
            yield tuple(f"{group}={name}" for group, name in plugins.items()), changed


def _with(config: TrainConfig, plugins: Mapping[str, str]) -> TrainConfig:
    """The configuration with these plug-ins, and without a key that not every optimizer reads."""
    for group, name in plugins.items():
        config = with_plugin(config, group, name)
    return replace(config, moments_dtype="auto") if "optimizer" in plugins else config


def _published_column(config: TrainConfig, setting: Setting) -> Column | None:
    """This run with the positions of S as the published code stores them, if it has any."""
    device = plan_device(config)
    model = planned_model(config, weight_dtype(config, device))
    if not stored_bytes(model)["indices"]:
        return None
    set_paths(model, "composed", config.micro_batch_size * config.seq_len, device)
    plan = plan_memory(
        model,
        update_shape(config, device, model, setting.num_processes),
        optimizer_state_bytes(config, model),
        published_stored_bytes(model),
        update_temporaries(config, model, device),
    )
    return Column((PUBLISHED,), plan.groups, count_parameters(model)["total"])


def planned_model(config: TrainConfig, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """The model of a run on the meta device; None: in the dtype that it trains in."""
    assert config.model.vocab_size is not None
    return build_model(config, config.model.vocab_size, dtype or weight_dtype(config, plan_device(config)))
