"""What a run of a configuration needs of memory, and what to change when that is too much.

The equations are in models/memory_plan.py; here they are told what a configuration means for them.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sltrain.config import TrainConfig
from sltrain.layers.sparse import has_kernel
from sltrain.models.llama import LlamaForCausalLM
from sltrain.models.memory_plan import MemoryPlan, UpdateShape, plan_memory
from sltrain.optim.build import OPTIMIZERS, state_bytes, step_bytes

PlanOf = Callable[[TrainConfig], MemoryPlan]


def plan_run(config: TrainConfig, model: LlamaForCausalLM, device: torch.device, num_processes: int) -> MemoryPlan:
    """The plan of one process's device for `model`, built from `config` and with its paths set, on any device."""
    return plan_memory(
        model,
        update_shape(config, device, next(model.parameters()).dtype, num_processes),
        optimizer_state_bytes(config, model),
        update_temporaries=update_temporaries(config, model, device),
    )


def optimizer_state_bytes(config: TrainConfig, model: nn.Module) -> int:
    """The optimizer's whole state for the parameters of a model."""
    name, rounds = config.optimizer.name, config.stochastic_rounding
    own = sum(state_bytes(name, p.numel(), p.element_size(), rounds) for p in set(model.parameters()))
    return OPTIMIZERS[name].shared_bytes + own


def update_temporaries(config: TrainConfig, model: nn.Module, device: torch.device) -> int:
    """What the optimizer takes while it works."""
    return step_bytes(
        config.optimizer.name,
        [(p.numel(), p.element_size()) for p in model.parameters()],
        device.type,
        stochastic_rounding=config.stochastic_rounding,
        accumulation=config.accumulation,
    )


def update_shape(config: TrainConfig, device: torch.device, dtype: torch.dtype, num_processes: int) -> UpdateShape:
    """An update of this configuration on one of `num_processes` processes."""
    return UpdateShape(
        batch_size=config.micro_batch_size,
        seq_len=config.seq_len,
        num_micro_batches=max(1, config.global_batch_size // (config.micro_batch_size * num_processes)),
        per_layer_update=config.per_layer_update,
        holds_gradients=not (config.per_layer_update and config.accumulation == "fold"),
        uses_ddp=num_processes > 1 and not config.per_layer_update,
        device_type=device.type,
        has_kernel=device.type == "cpu" and has_kernel(device, dtype),
    )


def settings_that_fit(config: TrainConfig, plan_of: PlanOf, free_bytes: int) -> tuple[str, MemoryPlan] | None:
    """Overrides with which the run needs no more than `free_bytes`, and its plan then; None if there are none.

    Tried, in this order: smaller micro-batches, activation checkpointing, 8-bit Adam, per-layer updates. What turns out
    not to be needed is left out.
    """

    def plan_with(changes: list[Change]) -> MemoryPlan:
        return plan_of(_apply(config, changes))

    taken: list[Change] = []
    for change in _changes(config):
        taken = [other for other in taken if other.keys() != change.keys()] + [change]  # one micro-batch size
        if plan_with(taken).total_bytes <= free_bytes:
            break
    else:
        return None
    larger = [change for change in _changes(config) if "micro_batch_size" in change]
    for change in list(taken):
        fewer = [other for other in taken if other is not change]
        milder = [fewer] + [[size, *fewer] for size in larger if "micro_batch_size" in change]
        taken = next((some for some in milder if plan_with(some).total_bytes <= free_bytes), taken)
    return _as_typed(taken), plan_with(taken)


Change = dict[str, Any]  # keys of the configuration with their new values; `optimizer` with a name


def _changes(config: TrainConfig) -> list[Change]:
    """What may save memory, mildest first."""
    sizes = [size for size in range(1, config.micro_batch_size) if config.micro_batch_size % size == 0]
    changes: list[Change] = [{"micro_batch_size": size} for size in reversed(sizes)]
    if not config.activation_checkpointing:
        changes.append({"activation_checkpointing": True})
    if config.optimizer.name == "adamw" and importlib.util.find_spec("bitsandbytes") is not None:
        changes.append({"optimizer": "adam8bit"})
    if not config.per_layer_update and not config.compile:
        clip = config.grad_clip
        instead = {} if clip is None else {"grad_clip": None, "grad_clip_per_parameter": clip}
        changes.append({"per_layer_update": True, **instead})
    return changes


def _apply(config: TrainConfig, changes: list[Change]) -> TrainConfig:
    values = {key: value for change in changes for key, value in change.items()}
    if "optimizer" in values:
        values["optimizer"] = dataclasses.replace(config.optimizer, name=values["optimizer"])
    return dataclasses.replace(config, **values)


def _as_typed(changes: list[Change]) -> str:
    """The changes as one would type them."""
    items = [item for change in changes for item in change.items()]
    return " ".join(f"{key}={'true' if value is True else 'null' if value is None else value}" for key, value in items)
