"""parallel= -> how the processes share the model (engine/strategy.py): chosen, and refused where it cannot work.

    auto   one process: single. Several: ddp.

All processes are compared first: different code or settings would train different models, and fail late.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
from typing import Any

from sltrain.config import TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.strategy import Replicated, Single, Strategy
from sltrain.models.llama import LlamaForCausalLM

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "tokenizers", "safetensors", "numpy", "datasets", "bitsandbytes")  # whose version may change a run


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
    ranks.everywhere(
        lambda: _refuse(
            f"the processes differ: {keys[0]} is {first} on rank 0 and {second} on rank {other}{more}; start all of"
            " them with the same command and packages"
        )
    )


def _refuse(reason: str) -> None:
    raise ValueError(reason)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_parallel(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError if the model cannot be shared so by that many processes."""
    if config.parallel.name == "single" and world_size > 1:
        raise ValueError(
            f"parallel=single is for one process, and there are {world_size}; set parallel=auto, or start one process"
        )


def build_strategy(config: TrainConfig, model: LlamaForCausalLM, ranks: Ranks) -> Strategy:
    """The strategy of a run whose model is on the meta device; `auto` is decided here."""
    if ranks.world_size == 1:
        return Single(ranks)
    return Replicated(ranks)
