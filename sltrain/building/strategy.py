"""parallel= -> how the processes share the model (engine/strategy.py): chosen, and refused where it cannot work.

    auto   one process: single. Several: ddp while its planned memory fits every process's device, else fsdp. A run that
           continues on as many processes keeps what it had: another one would change the last bits.

All processes are compared first: different code or settings would train different models, and fail late.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from sltrain.building.memory import plan_model
from sltrain.building.memory_guard import free_share
from sltrain.building.model import DTYPES
from sltrain.config import ParallelConfig, TrainConfig, num_steps
from sltrain.engine.actions import Running
from sltrain.engine.distributed import Ranks
from sltrain.engine.strategy import Replicated, Single, Strategy
from sltrain.log import memory_size
from sltrain.models.llama import LlamaForCausalLM
from sltrain.optim.build import members, works_in_pieces
from sltrain.planning.roles import parameters_of

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "tokenizers", "safetensors", "numpy", "datasets", "bitsandbytes")  # whose version may change a run
SHARDED = ("fsdp", "hsdp")
KEYS_OF_SHARDS = ("param_dtype", "reduce_dtype", "reshard_after_forward", "reduce_every", "checkpoint")


def compare_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError, on all ranks, if their settings or versions differ, naming the first that does."""
    facts = {**_flat(dataclasses.asdict(config)), "version of Python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[f"version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[f"version of {package}"] = "none"
    digests = ranks.gather(hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyones = ranks.gather(facts)
    other = next(number for number, digest in enumerate(digests) if digest != digests[0])
    keys = [key for key in {**everyones[0], **everyones[other]} if everyones[0].get(key) != everyones[other].get(key)]
    first, second = (everyones[number].get(keys[0], "nothing") for number in (0, other))
    more = f" ({len(keys) - 1} more differ)" if len(keys) > 1 else ""
    ranks.refuse(
        f"the processes differ: {keys[0]} is {first} on rank 0 and {second} on rank {other}{more}; start all of"
        " them with the same command and packages"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_parallel(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError if that many processes cannot share a model so, or if the configuration does not go with
    shards."""
    name, replicas = config.parallel.name, config.parallel.replicas
    if name == "single" and world_size > 1:
        raise ValueError(
            f"parallel=single is for one process, and there are {world_size}; set parallel=auto, or start one process"
        )
    if replicas is not None and name != "hsdp":
        raise ValueError(f"parallel.replicas={replicas} is for parallel=hsdp, and parallel is {name}; set one of them")
    for key in KEYS_OF_SHARDS if name in ("single", "ddp") else ():
        if (value := getattr(config.parallel, key)) != getattr(ParallelConfig(), key):
            raise ValueError(
                f"parallel.{key}={str(value).lower()} is for parallel=fsdp and hsdp, and parallel is {name}; set one of"
                f" them, or drop parallel.{key}"
            )
    if name == "hsdp" and world_size % (count := num_replicas(config, world_size)):
        raise ValueError(
            f"parallel.replicas={count} x shards must be the number of processes, and {world_size} is no multiple of"
            f" {count}; set parallel.replicas to one of {', '.join(map(str, _divisors(world_size)))}"
        )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def num_replicas(config: TrainConfig, world_size: int) -> int:
    """The copies of a model that is sharded: of parallel=hsdp by default one a machine."""
    if config.parallel.name != "hsdp":
        return 1
    return config.parallel.replicas or max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def check_sharding(config: TrainConfig, model: LlamaForCausalLM, world_size: int) -> None:
    """Raise ValueError if parallel=fsdp or hsdp was asked for and does not go with the rest. `model` is on the meta
    device."""
    name = config.parallel.name
    if name in SHARDED and world_size > 1 and (reason := against_shards(config, model)) is not None:
        raise ValueError(f"parallel={name}: {reason}, or parallel=ddp")


def against_shards(config: TrainConfig, model: LlamaForCausalLM) -> str | None:
    """Why the configuration does not go with shards, with the remedy; None: it does."""
    pieces = [m.name for m in members(config.optimizer) if works_in_pieces(m, config.stochastic_rounding)]
    if pieces:
        return (
            f"stochastic_rounding=true with optimizer={pieces[0]} updates pieces of whole tensors, which no process"
            " keeps; set optimizer=adamw, or stochastic_rounding=false"
        )
    for info in parameters_of(model).values():
        if info.in_codes:
            return f"method={config.method.name} holds weights as codes, which are not cut; set another method"
        if not info.shape:
            return f"{info.name} is a single number without a dimension, which cannot be cut; choose another method"
    changes = [action.name for action in config.method.actions(Running(model, num_steps(config)))]
    changes += [phase.name for phase in config.method.phases(num_steps(config)) if phase.after > 0]
    if changes:
        return (
            f"method={config.method.name} changes whole matrices between updates ({', '.join(changes)}), of which each"
            " process has a part; set method=sltrain, low_rank, full or cola without restarts and moves"
        )
    return None


def build_strategy(
    config: TrainConfig, model: LlamaForCausalLM, ranks: Ranks, earlier: Mapping[str, Any] | None = None
) -> Strategy:
    """The strategy of a run whose model is on the meta device. All ranks call it, and choose the same. `earlier`: the
    name and number of processes of a run that continues, if its checkpoint says so."""
    if ranks.world_size == 1:
        if config.parallel.name in ("ddp", *SHARDED):
            logger.info(f"note       parallel={config.parallel.name} shares a model among processes, and there is one")
        return Single(ranks)
    name = config.parallel.name
    if name == "auto":
        name = _kept(earlier, ranks) or _choose(config, model, ranks)
    if name == "ddp":
        return Replicated(ranks)
    from sltrain.engine.sharded import Settings, Sharded  # torch.distributed.tensor takes seconds to import

    own = next(model.parameters()).dtype
    strategy = Sharded(
        ranks,
        Settings(
            replicas=num_replicas(config, ranks.world_size),
            param_dtype=_other_dtype(config.parallel.param_dtype, own),
            reduce_dtype=None if config.parallel.reduce_dtype == "auto" else DTYPES[config.parallel.reduce_dtype],
            reshard_after_forward=config.parallel.reshard_after_forward,
            reduces_each_micro_batch=config.parallel.reduce_every == "micro_batch",
            saves_shares=config.parallel.checkpoint == "sharded",
        ),
    )
    copies = f", {strategy.settings.replicas} copies" if strategy.settings.replicas > 1 else ""
    logger.info(f"parallel   {strategy.name}: each process holds 1/{strategy.num_shards} of every tensor{copies}")
    return strategy


def _other_dtype(name: str, own: torch.dtype) -> torch.dtype | None:
    """The dtype of this name; None if it is that of the weights."""
    return None if name == "auto" or DTYPES[name] == own else DTYPES[name]


def _kept(earlier: Mapping[str, Any] | None, ranks: Ranks) -> str | None:
    """What parallel=auto was before, if it can be that again; None: it is chosen."""
    name = None if earlier is None or earlier["num_processes"] != ranks.world_size else earlier["name"]
    if name not in ("ddp", "fsdp"):
        return None
    other = {"ddp": "fsdp", "fsdp": "ddp"}[name]
    logger.info(f"parallel   {name}, as before on {ranks.world_size} processes; parallel={other} would change it")
    return str(name)


def _choose(config: TrainConfig, model: LlamaForCausalLM, ranks: Ranks) -> str:
    """What parallel=auto means for several processes."""
    free = [each for each in ranks.gather(free_share(ranks)) if each is not None]
    try:
        # Of one process: where a machine has no compiler for the kernel, its own plan is another one.
        needed = ranks.on_main(lambda: plan_model(config, model, ranks.device, ranks.world_size).total_bytes)
    except ValueError:  # a layer that cannot be planned; the guard says so
        return "ddp"
    if not free or needed <= min(free):
        logger.info(f"parallel   ddp: {memory_size(needed)} fit each of {ranks.world_size} processes")
        return "ddp"
    reason = against_shards(config, model)
    if reason is not None:
        logger.info(f"parallel   ddp, though {memory_size(needed)} do not fit; fsdp would need a change: {reason}")
        return "ddp"
    logger.info(f"parallel   fsdp, since {memory_size(needed)} do not fit into {memory_size(min(free))}")
    return "fsdp"
