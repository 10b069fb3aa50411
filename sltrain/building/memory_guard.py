"""A run that does not fit into memory is refused before it begins, with settings that would fit."""

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sltrain.building.memory import host_bytes, plan_model, settings_that_fit, sharding_of
from sltrain.building.model import build_model
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.memory import free_bytes
from sltrain.engine.strategy import Strategy
from sltrain.log import memory_size
from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.memory_plan import MemoryPlan
from sltrain.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)


def as_chosen(config: TrainConfig, strategy: Strategy) -> TrainConfig:
    """The configuration of a run in shards with what `parallel=auto` and the default of `replicas` have become."""
    if not strategy.is_sharded:
        return config
    cut: Any = strategy  # engine/sharded.py, which is imported only by runs that need it
    replicas = cut.settings.replicas if strategy.name == "hsdp" else None
    return replace(config, parallel=replace(config.parallel, name=strategy.name, replicas=replicas))


def free_share(ranks: Ranks) -> int | None:
    """Free memory for this process on its device; None if the system does not say."""
    free = free_bytes(ranks.device)
    if free is not None and ranks.device.type == "cpu":
        free //= ranks.num_on_this_machine  # they share it
    return free


def guard_memory(
    config: TrainConfig,
    model: LlamaForCausalLM,
    folder: RunFolder,
    strategy: Strategy,
    check: Callable[[TrainConfig], None],
) -> MemoryPlan | None:
    """The plan of the run's memory, None if it cannot be planned; both are logged. Raises ValueError if it does not
    fit, or cannot be planned, and the guard is on; what it says would fit, `check` accepts (it raises ValueError for
    what a start would refuse)."""
    ranks, config = strategy.ranks, as_chosen(config, strategy)
    sharding = sharding_of(config, ranks.world_size)
    device, dtype, vocab_size = ranks.device, model.lm_head.weight.dtype, model.lm_head.out_features

    def plan_of(changed: TrainConfig) -> MemoryPlan:
        return plan_model(changed, build_model(changed, vocab_size, dtype), device, ranks.world_size, sharding)

    try:
        plan = plan_of(config)
    except ValueError as error:
        if config.memory_guard:
            raise
        logger.info(f"memory     cannot be planned: {error}")
        return None
    if ranks.is_main or strategy.savers is not None:  # each machine's memory, where every process saves
        num_copies = 1 if strategy.savers is None else ranks.num_on_this_machine
        num_shards = 1 if sharding is None else sharding.num_shards
        _guard_host(config, num_copies * host_bytes(config, model, device, num_shards))
    free = free_share(ranks)
    logger.info(f"memory     {memory_size(plan.total_bytes)} planned for tensors, {memory_size(free)} free on {device}")
    if free is None or plan.total_bytes <= free or not config.memory_guard:
        return plan
    keys = CHANGEABLE_ON_RESUME if folder.has_progress else None
    found = settings_that_fit(config, plan_of, free, ranks.world_size, keys, check)
    advice = "a smaller model" if found is None else f"{found[0]} ({memory_size(found[1].total_bytes)})"
    raise ValueError(
        f"the run needs {memory_size(plan.total_bytes)} on {device}, where {memory_size(free)} are free; what would"
        f" fit: {advice}; memory_guard=off starts all the same, sltrain-plan shows where the memory goes"
    )


def _guard_host(config: TrainConfig, needed: int) -> None:
    """Log how much of the host's memory a run on a GPU needs to save in the background, if it does. Raises ValueError
    if that is not free and the guard is on."""
    if not needed:
        return
    free = free_bytes(torch.device("cpu"))
    logger.info(
        f"memory     {memory_size(needed)} of the host for checkpoint_async=true, {memory_size(free)} free there"
    )
    if config.memory_guard and free is not None and needed > free:
        raise ValueError(
            f"checkpoint_async=true copies {memory_size(needed)} to the host's memory, where {memory_size(free)} are"
            f" free on {socket.gethostname()}; set checkpoint_async=false"
        )
