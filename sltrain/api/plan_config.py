"""The schema of `sltrain-plan`: the keys it has beside those of `sltrain-train`, and the cards it knows.

Values come from conf/plan.yaml and what is typed. This file imports no torch.
"""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from sltrain.compose import Schema, compose_config, parse_overrides, run_config
from sltrain.config import NoBudget, TrainConfig


@dataclass
class PlanConfig:
    """What is shown of a plan."""

    format: str = MISSING  # table, or json: the last line of stdout is one object
    cards: Any = MISSING  # a card to fit, or a list: names (rtx4090, h100) or sizes (24, 24GB, in GiB)
    reserve_gb: float = MISSING  # of a card, in 1e9 bytes, for the driver, its libraries and fragments
    num_processes: int = MISSING  # processes that share an update, one a card
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
    order="conf/plan.yaml sets the rest; all keys of sltrain-train can be set too (sltrain-train --help)",
    advice="sltrain-plan --help lists the keys",
)
ANY_BUDGET = 10_000  # updates; a plan asks for the phases of a run, if its method has any
KEYS = {item.name for item in fields(PlanConfig)}


def split_arguments(
    arguments: list[str], own_keys: Collection[str] = KEYS, command: str = "sltrain-plan"
) -> tuple[list[str], list[str]]:
    """The overrides of a command's own keys, and those of `sltrain-train`. Raises ValueError."""
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"{argument}: {command} knows KEY=VALUE and --help, no other option, and no sweeps")
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


def read_arguments(arguments: list[str]) -> tuple[PlanConfig, TrainConfig]:
    """What is shown, and the run that is planned. Raises ValueError."""
    own, others = split_arguments(arguments)
    return compose_config(own, PLAN), compose_run(others)
