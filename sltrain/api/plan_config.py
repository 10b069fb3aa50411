"""What is asked of `sltrain-plan`: the keys it has beside those of `sltrain-train`, the cards it knows, and the runs to
plan.

    sltrain-plan model=llama_7b                                          one run, beside others that are of interest
    sltrain-plan model=llama_7b optimizer=adamw,scale method=full,sltrain   one for each combination of listed values

Values come from conf/plan.yaml and what is typed. This file imports no torch.
"""

import difflib
import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from sltrain.compose import Schema, compose_config, parse_overrides, run_config, sweep_values
from sltrain.config import NoBudget, TrainConfig
from sltrain.config_checks import NotTogether


@dataclass
class PlanConfig:
    """What is shown of a plan."""

    format: str = MISSING  # table, or json: the last line of stdout is one object
    cards: Any = MISSING  # a card to fit, or a list: names (rtx4090, h100) or sizes (24, 24GB, in GiB)
    reserve_gb: float = MISSING  # of a card, in 1e9 bytes, for the driver, its libraries and fragments
    num_processes: int = MISSING  # processes that share an update, one a card
    bandwidth: float | None = MISSING  # GB/s that one process can send while it receives; null: bytes alone are said
    paper_convention: bool = MISSING  # count as the SLTrain paper does: bfloat16, int64 positions, no activations
    measure: bool = MISSING  # run three updates here, on random tokens, and show what they took beside the plan


# GiB, as the driver shows them: where ECC takes a part, less than is on the box. Of cards that come in several sizes,
# the larger ones have it in their name.
CARDS = {
    "rtx3060": 12,
    "rtx4070": 12,
    "t4": 15,
    "v100": 15.8,
    "rtx4080": 16,
    "rtx3090": 24,
    "rtx4090": 24,
    "a10": 22.5,
    "l4": 22.5,
    "rtx5090": 31.8,
    "v100_32gb": 31.7,
    "a100": 40,
    "a6000": 48,
    "l40s": 45,
    "a100_80gb": 80,
    "h100": 79.6,
    "h200": 140.4,
    "b200": 179,
}
FORMATS = ("table", "json")
GIB = 2**30


def validate(config: PlanConfig) -> None:
    """Check everything that the values alone decide. Raises ValueError naming the key, its value and what to
    change."""
    if config.format not in FORMATS:
        raise ValueError(f"format={config.format}: choose one of {', '.join(FORMATS)}")
    if not 0 <= config.reserve_gb < float("inf"):
        raise ValueError(f"reserve_gb={config.reserve_gb}: must be a number of GB, 0 or more")
    if config.num_processes < 1:
        raise ValueError(f"num_processes={config.num_processes}: must be at least 1")
    if config.bandwidth is not None and not 0 < config.bandwidth < float("inf"):
        raise ValueError(f"bandwidth={config.bandwidth}: must be a number of GB/s above 0, such as bandwidth=50")
    if config.bandwidth is not None and config.num_processes == 1:
        raise ValueError(
            f"bandwidth={config.bandwidth:g}: one process sends nothing; set num_processes=, or drop bandwidth"
        )
    if config.measure and config.paper_convention:
        raise ValueError("measure=true and paper_convention=true: the paper's count cannot be measured; drop one")
    if config.measure and config.num_processes > 1:
        raise ValueError("measure=true measures one process; drop num_processes")
    if not chosen_cards(config):
        raise ValueError("cards=[]: give at least one, such as cards=[24]")
    for card in chosen_cards(config):
        card_bytes(card)


def chosen_cards(config: PlanConfig) -> list[Any]:
    """The cards to fit, as they were typed."""
    return config.cards if isinstance(config.cards, list) else [config.cards]


def card_bytes(card: Any) -> int:
    """The memory of a card: a name of CARDS or a size in GiB. Raises ValueError for anything else."""
    text = str(card).lower()
    size: float | None = CARDS.get(text)
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gi?b)?", text)
    if size is None and number is not None:
        size = float(number[1])
    if not size:
        raise ValueError(
            f"cards: {card} is unknown; give a size in GiB as in cards=[24], or a name: {', '.join(CARDS)}"
        )
    return int(size * GIB)


def card_name(card: Any) -> str:
    """How a card is named in tables and JSON: `24GB` for a size, the name otherwise."""
    text = str(card).lower()
    return text if text in CARDS else re.sub(r"(gi?b)?$", "GB", text, count=1)


# ---- what is typed

PLAN = Schema(
    "plan",
    PlanConfig,
    validate,
    has_groups=False,
    order="all keys of sltrain-train can be set too (sltrain-train --help)",
    advice="sltrain-plan --help lists the keys",
)
THIS_RUN = ("this run",)  # the name of a run without listed values
ANY_BUDGET = 10_000  # updates; a plan asks for the phases of a run, if its method has any
KEYS = {item.name for item in fields(PlanConfig)}


def split_arguments(
    arguments: list[str], own_keys: Collection[str] = KEYS, command: str = "sltrain-plan"
) -> tuple[list[str], list[str]]:
    """The overrides of a command's own keys, and those of `sltrain-train`. Raises ValueError."""
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"{argument}: {command} knows KEY=VALUE and --help, and no other option")
    keys = [override.key_or_group for override in parse_overrides(arguments)]
    for key in keys:
        near = difflib.get_close_matches(key, own_keys, n=1, cutoff=0.8)
        if near and key not in own_keys:
            raise ValueError(f"unknown key {key!r}; did you mean {near[0]}?")
    own = [text for text, key in zip(arguments, keys, strict=True) if key in own_keys]
    others = [text for text, key in zip(arguments, keys, strict=True) if key not in own_keys]
    return own, others


def compose_run(overrides: list[str]) -> TrainConfig:
    """The configuration of a run that is only planned: it needs no budget. Raises ValueError."""
    try:
        return run_config(overrides)
    except NoBudget:
        return run_config([*overrides, f"max_steps={ANY_BUDGET}"])


@dataclass(frozen=True)
class Asked:
    """A run to plan: its configuration, or why there can be none."""

    config: TrainConfig | None
    names: tuple[str, ...] = THIS_RUN  # of its column: the listed values, as they are typed alone
    refusal: str = ""


def asked_runs(overrides: list[str]) -> list[Asked]:
    """The run that is asked for; of keys with lists of values, as in a sweep, each combination, whether it can be
    trained or not. Raises ValueError for a mistake, and if none can be trained."""
    choices = [sweep_values(override) for override in parse_overrides(overrides)]
    if all(len(values) == 1 for values in choices):
        return [Asked(compose_run(overrides))]
    runs, error = [], None
    for combination in itertools.product(*choices):
        names = tuple(text for text, values in zip(combination, choices, strict=True) if len(values) > 1)
        try:
            runs.append(Asked(compose_run(list(combination)), names))
        except NotTogether as refused:
            error = error or refused
            runs.append(Asked(None, names, str(refused)))
    if error is not None and all(run.config is None for run in runs):
        raise error
    return runs


def read_arguments(arguments: list[str]) -> tuple[PlanConfig, list[Asked]]:
    """What is shown, and the runs that are planned. Raises ValueError."""
    own, others = split_arguments(arguments)
    settings, runs = compose_config(own, PLAN), asked_runs(others)
    if settings.measure and len(runs) > 1:
        raise ValueError(f"measure=true measures one run, and {len(runs)} are listed; drop it, or give single values")
    return settings, runs
