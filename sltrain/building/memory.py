"""What a run of a configuration needs of memory, and what to change when that is too much.

The equations are in planning/memory_plan.py; here they are told what a configuration means for them.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Collection
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from sltrain.building.phases import actions_of, phases_of, structures
from sltrain.compose import with_plugin
from sltrain.config import TrainConfig
from sltrain.engine.owners import by_module, deal
from sltrain.layers.cost import set_paths
from sltrain.layers.sparse import has_kernel
from sltrain.models.llama import LlamaForCausalLM
from sltrain.optim.build import member_for, state_bytes, step_bytes
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.parameters import ParamInfo
from sltrain.planning.accounting import stored_bytes
from sltrain.planning.memory_plan import MemoryPlan, plan_memory
from sltrain.planning.roles import parameters_of
from sltrain.planning.sharding import Sharding, local_infos
from sltrain.planning.stages import UpdateShape

GPUS_A_MACHINE = 8
ELEMENT = {"auto": None, "float32": 4, "bfloat16": 2}  # bytes
PlanOf = Callable[[TrainConfig], MemoryPlan]


def plan_model(
    config: TrainConfig,
    model: LlamaForCausalLM,
    device: torch.device,
    num_processes: int,
    sharding: Sharding | None = None,
) -> MemoryPlan:
    """The plan of one process on `device` for `model`, built from `config` on the meta device: that of the phase of the
    run which needs most. Weights are whole on each of `num_processes`, or divided. Sets the paths that a run would
    choose."""
    num_shards = 1 if sharding is None else sharding.num_shards
    plans = []
    coming = [phase for phase in phases_of(config) if phase.after > 0]
    for (phase, structure), after in zip_longest(structures(config, model), coming):
        assert isinstance(structure, LlamaForCausalLM)
        actions = actions_of(config, structure)
        set_paths(structure, config.layer_path, config.micro_batch_size * config.seq_len, device)
        plan = plan_memory(
            structure,
            update_shape(config, device, structure, num_processes, sharding),
            optimizer_state_bytes(config, structure, num_shards),
            {
                **stored_bytes(structure, num_shards),
                **average_bytes(config, structure, num_shards),
                **copy_bytes(config, structure, device, num_shards),
            },
            update_temporaries=update_temporaries(config, structure, device, num_shards)
            + sum(a.before_bytes for a in actions),
            action_temporaries=max(
                0 if after is None else after.temporary_bytes(structure), *(a.temporary_bytes for a in actions), 0
            ),
            action_passes=any(a.passes for a in actions),
        )
        plans.append(dataclasses.replace(plan, phase=phase))
    return max(plans, key=lambda plan: plan.total_bytes)


def sharding_of(config: TrainConfig, num_processes: int) -> Sharding | None:
    """How `parallel=` cuts a model over so many processes, machines of which nothing is known having GPUS_A_MACHINE;
    None: it does not. `auto` counts as ddp. Raises ValueError for replicas that do not divide the processes."""
    how = config.parallel
    if num_processes == 1 or how.name not in ("fsdp", "hsdp"):
        return None
    replicas = (how.replicas or max(1, num_processes // GPUS_A_MACHINE)) if how.name == "hsdp" else 1
    if num_processes % replicas:
        raise ValueError(
            f"parallel.replicas={replicas}: {num_processes} processes are no multiple of it; choose a divisor of"
            f" {num_processes}"
        )
    return Sharding(
        num_shards=num_processes // replicas,
        replicas=replicas,
        gathered_element=ELEMENT[how.param_dtype],
        reduced_element=ELEMENT[how.reduce_dtype],
        reduces_each=how.reduce_every == "micro_batch",
        reshards=how.reshard_after_forward,
    )


def average_bytes(config: TrainConfig, model: nn.Module, num_shards: int = 1) -> dict[str, int]:
    """The bytes of `ema`, as a group of a plan."""
    if config.ema is None:
        return {}
    trained = local_infos(parameters_of(model).values(), num_shards)
    return {"averaged_weights": 4 * sum(info.numel for info in trained)}


def copied_bytes(config: TrainConfig, model: nn.Module, num_shards: int = 1) -> int:
    """The bytes that rank 0 copies to host memory for a save in the background: all that a checkpoint holds, or its
    share of that."""
    num_shards = num_shards if config.parallel.checkpoint == "sharded" else 1
    lasting = [*stored_bytes(model, num_shards).values(), *average_bytes(config, model, num_shards).values()]
    return sum(lasting) + optimizer_state_bytes(config, model, num_shards)


def copy_bytes(config: TrainConfig, model: nn.Module, device: torch.device, num_shards: int = 1) -> dict[str, int]:
    """`copied_bytes` as a group of a plan: on a GPU none, because it is in the memory of the host."""
    copies = config.checkpoint_async and device.type == "cpu"
    return {"checkpoint_copy": copied_bytes(config, model, num_shards)} if copies else {}


def host_bytes(config: TrainConfig, model: LlamaForCausalLM, device: torch.device, num_shards: int = 1) -> int:
    """Of a run on a GPU: the most that its rank 0 takes of the host's memory for these copies, in any phase."""
    if not config.checkpoint_async or device.type == "cpu":
        return 0
    return max(copied_bytes(config, structure, num_shards) for _, structure in structures(config, model))


def optimizer_state_bytes(config: TrainConfig, model: nn.Module, num_shards: int = 1) -> int:
    """The optimizer's state on one rank: for the parameters of a model, for its shards of them, and for the modules
    that the rank owns whole; that of the rank with most."""
    cut, whole = _cut_and_whole(config, model, num_shards)
    modules = by_module((info.name, info) for info in whole)
    owned = [0] * num_shards
    for module, owner in deal(
        {name: sum(i.numel for i in infos) for name, infos in modules.items()}, num_shards
    ).items():
        owned[owner] += state_bytes(config.optimizer, modules[module], config.stochastic_rounding)
    return state_bytes(config.optimizer, local_infos(cut, num_shards), config.stochastic_rounding) + max(owned)


def whole_bytes(config: TrainConfig, model: nn.Module, num_shards: int) -> int:
    """Bytes of the parameters that are updated as a whole, of a model in so many shards."""
    _, whole = _cut_and_whole(config, model, num_shards)
    return sum(info.numel * info.element_size for info in whole)


def _cut_and_whole(config: TrainConfig, model: nn.Module, num_shards: int) -> tuple[list[ParamInfo], list[ParamInfo]]:
    """The parameters of which the optimizer gets shards, and those that one rank gets whole (optim/whole_tensors.py);
    of one process, all are in the first."""
    cut: list[ParamInfo] = []
    whole: list[ParamInfo] = []
    for info in parameters_of(model).values():
        on_shards = member_for(config.optimizer, info).works_on_shards(config.stochastic_rounding)
        (cut if num_shards == 1 or on_shards else whole).append(info)
    return cut, whole


def update_temporaries(config: TrainConfig, model: nn.Module, device: torch.device, num_shards: int = 1) -> int:
    """What the optimizer takes while it works. A module that a rank owns has its whole weights and gradients there, and
    beside them what their update takes; then a padded copy of one parameter that is sent back, and the rows of it here
    (as much as gloo takes on a CPU for one that comes)."""
    rounding = config.stochastic_rounding
    cut, whole = _cut_and_whole(config, model, num_shards)
    needs = [step_bytes(config.optimizer, local_infos(cut, num_shards), device.type, rounding)]
    for infos in by_module((info.name, info) for info in whole).values():
        sizes = [info.numel * info.element_size for info in infos]
        sent = max(sizes) + max(sizes) // num_shards
        needs.append(2 * sum(sizes) + max(sent, step_bytes(config.optimizer, infos, device.type, rounding)))
    return max(needs)


def update_shape(
    config: TrainConfig,
    device: torch.device,
    model: LlamaForCausalLM,
    num_processes: int,
    sharding: Sharding | None = None,
) -> UpdateShape:
    """An update of this configuration and its model on one of `num_processes` processes."""
    task_rows = max(model.config.max_position_embeddings, config.micro_batch_size * config.seq_len)
    return UpdateShape(
        batch_size=config.micro_batch_size,
        seq_len=config.seq_len,
        num_micro_batches=max(1, config.global_batch_size // (config.micro_batch_size * num_processes)),
        per_layer_update=config.per_layer_update,
        uses_ddp=num_processes > 1 and sharding is None and not config.per_layer_update,
        device_type=device.type,
        per_document=config.attention == "document",
        has_kernel=device.type == "cpu" and has_kernel(device, model.compute_dtype),
        task_rows=task_rows if config.eval_tasks else 0,
        sharding=sharding,
    )


def update_notes(config: TrainConfig, num_processes: int) -> list[str]:
    """A warning if per-layer updates have to hold gradients from micro-batch to micro-batch; else nothing."""
    num_micro_batches = config.global_batch_size // (config.micro_batch_size * num_processes)
    if not config.per_layer_update or num_micro_batches <= 1:
        return []
    return [
        f"{num_micro_batches} micro-batches an update: gradients wait for the last one, which per_layer_update=true"
        f" cannot free; it can with global_batch_size={config.micro_batch_size * num_processes}"
    ]


Change = dict[str, Any]  # keys of the configuration with their new values; `optimizer` with a name


def settings_that_fit(
    config: TrainConfig,
    plan_of: PlanOf,
    free_bytes: int,
    num_processes: int = 1,
    keys: Collection[str] | None = None,
    check: Callable[[TrainConfig], None] = lambda config: None,
) -> tuple[str, MemoryPlan] | None:
    """The least intrusive overrides that fit the run into `free_bytes`, as a command line, and the resulting plan; None
    if nothing fits. Only `keys` are changed (None: all), and to nothing for which `check` raises ValueError.

    Combinations of smaller micro-batches, activation checkpointing, 8-bit Adam and updates inside backward are tried,
    few before many, and of as many those that come first in this list. At last also a global batch of one micro-batch,
    without which updates inside backward free little: that changes the recipe.
    """
    sizes = [size for size in range(config.micro_batch_size, 0, -1) if config.micro_batch_size % size == 0]
    micro_batches: list[Change] = [{}, *({"micro_batch_size": size} for size in sizes[1:])]
    others = _switches(config)
    one_pass: list[Change] = [{"global_batch_size": size * num_processes, "micro_batch_size": size} for size in sizes]
    combinations = [
        [change, *chosen] if change else list(chosen)
        for batches in (micro_batches, one_pass)
        for count in range(len(others) + 1)
        for chosen in itertools.combinations(others, count)
        for change in batches
    ]
    for changes in combinations:
        if keys is not None and not all(key in keys for change in changes for key in change):
            continue
        changed = _apply(config, changes)
        with contextlib.suppress(ValueError):
            plan = plan_of(changed)
            if plan.total_bytes <= free_bytes:
                check(changed)
                return _as_typed(changes), plan
    return None


def _switches(config: TrainConfig) -> list[Change]:
    """What may save memory besides smaller micro-batches, the least intrusive first."""
    changes: list[Change] = [{"checkpoint_async": False}] if config.checkpoint_async else []
    if not config.activation_checkpointing:
        changes.append({"activation_checkpointing": True})
    if (smaller := config.optimizer.smaller) is not None and not config.method.changes_vectors():
        package = OPTIMIZERS.load(smaller).package
        if package is None or importlib.util.find_spec(package) is not None:
            changes.append(
                {"optimizer": smaller} | ({} if config.moments_dtype == "auto" else {"moments_dtype": "auto"})
            )
    needs_all = config.compile or config.method.acts_before_step() or config.optimizer.whole_update
    if not config.per_layer_update and not needs_all:
        clip = config.grad_clip
        instead = {} if clip is None else {"grad_clip": None, "grad_clip_per_parameter": clip}
        changes.append({"per_layer_update": True, **instead})
    return changes


def _apply(config: TrainConfig, changes: list[Change]) -> TrainConfig:
    values = {key: value for change in changes for key, value in change.items()}
    chosen = values.pop("optimizer", None)
    changed = dataclasses.replace(config, **values)
    return changed if chosen is None else with_plugin(changed, "optimizer", chosen)


def _as_typed(changes: list[Change]) -> str:
    """The changes as one would type them."""

    def typed(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"{key}={typed(value)}" for change in changes for key, value in change.items())
