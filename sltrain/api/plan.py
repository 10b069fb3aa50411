"""Configurations -> memory plan: a column for each run, and beside a single one dense training, GaLore and the
published SLTrain (plan_columns.py).

Nothing is allocated and no GPU is touched. Only `measure=true` trains, three updates on random tokens
(plan_measure.py).
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sltrain.api.plan_columns import (
    IN_SHARDS,
    Setting,
    compared_columns,
    plan_device,
    planned_model,
    refusal,
    run_column,
)
from sltrain.api.plan_config import Asked, PlanConfig, card_bytes, card_name, chosen_cards
from sltrain.api.plan_measure import NUM_UPDATES, check_free, measure
from sltrain.api.plan_table import Column, Plan
from sltrain.api.plan_traffic import traffic_lines
from sltrain.building.memory import host_bytes, sharding_of, update_notes
from sltrain.building.model import dtype_name, weight_dtype
from sltrain.building.trainer import check_updates_of
from sltrain.config import TrainConfig
from sltrain.config_checks import NotTogether
from sltrain.engine.distributed import pick_device

logger = logging.getLogger(__name__)


def build_plan(plan: PlanConfig, runs: list[Asked]) -> Plan:
    """The plan of these runs, at least one. Raises ValueError for what cannot be planned, and if no run can be
    trained."""
    cards = {card_name(card): card_bytes(card) - int(plan.reserve_gb * 1e9) for card in chosen_cards(plan)}
    setting = Setting(plan.num_processes, plan.paper_convention)
    columns, planned, refused, highest = [], [], [], ""
    for run in runs:
        try:
            config = _as_planned(run, plan)
            column, highest = run_column(run.names, config, setting)
        except NotTogether as error:
            if len(runs) == 1:
                raise
            refused.append((run.names, str(error)))
            continue
        columns.append(column)
        planned.append(config)
    if not planned:
        names, reason = refused[0]
        raise ValueError(f"{' '.join(names)}: {reason}")
    headline = _headline(planned, plan)
    if len(runs) == 1:
        headline += f"; highest during: {highest}" if highest else ""
    compared, remarks = compared_columns(planned[0], setting) if len(runs) == 1 else ([], [])
    remarks = [*(refusal(*it) for it in refused), *remarks]
    if not plan.paper_convention:
        remarks = [*_fits_in_shards(columns[0], compared, cards), *remarks]
        remarks = [*_notes_of(columns, planned, plan.num_processes), *remarks]
    measured = _measured(columns[0], planned[0]) if plan.measure else None
    traffic = None
    if plan.num_processes > 1 and not plan.paper_convention:
        lines, traffic = traffic_lines(planned[0], plan)
        remarks = [*(line if len(runs) == 1 else f"{columns[0].name}: {line}" for line in lines), *remarks]
    return Plan([*columns, *compared], cards, plan.reserve_gb, headline, remarks, measured, traffic)


def _as_planned(run: Asked, plan: PlanConfig) -> TrainConfig:
    """The run's configuration with a known vocabulary and, where it is measured, the device that is here. Raises
    NotTogether for one that cannot be."""
    if run.config is None:
        raise NotTogether(run.refusal)
    config = replace(run.config, model=replace(run.config.model, vocab_size=vocab_size(run.config)))
    return replace(config, device=pick_device(config.device).type) if plan.measure else config


def _headline(configs: list[TrainConfig], plan: PlanConfig) -> str:
    """What all columns have in common."""
    told = [_told(config, plan.paper_convention, plan.num_processes) for config in configs]
    return ", ".join(parts[0] for parts in zip(*told, strict=True) if len(set(parts)) == 1)


def _told(config: TrainConfig, paper_convention: bool, num_processes: int) -> tuple[str, ...]:
    if paper_convention:
        return config.model.name, config.method.name, "as the SLTrain paper counts"
    device = plan_device(config)
    dtype = "mixed precision" if config.precision == "mixed" else dtype_name(weight_dtype(config, device))
    rows = f"{config.micro_batch_size} x {config.seq_len} tokens"
    shared = f"one of {num_processes} processes"
    sharding = sharding_of(config, num_processes)
    if sharding is not None:
        copies = f", {sharding.replicas} copies" if sharding.replicas > 1 else ""
        shared += f" with 1/{sharding.num_shards} of every weight{copies}"
    told = (config.model.name, config.method.name, device.type, dtype, rows)
    return (*told, shared) if num_processes > 1 else told


def _measured(column: Column, config: TrainConfig) -> int:
    """Bytes of tensors in an update here. Raises ValueError if those that are planned are not free."""
    device = pick_device(config.device)
    check_free(column.total_bytes, device)
    logger.info(f"measuring {NUM_UPDATES} updates on random tokens on {device} ...")
    return measure(config, device, weight_dtype(config, device))


def vocab_size(config: TrainConfig) -> int:
    """The size of the vocabulary, if it can be known without reading a corpus. Raises ValueError."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe" and size.isdecimal():
        return int(size)
    path = Path(config.tokenizer).expanduser()
    if path.is_dir():  # of a run, an export or data=tokens
        path = path / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path)).get_vocab_size()
        except Exception as error:  # the library knows no narrower one
            raise ValueError(f"tokenizer={path} is no tokenizer.json: {error}") from error
    raise ValueError(
        f"the model has no vocabulary size of its own, and tokenizer={config.tokenizer} is no file here; set"
        " model.vocab_size"
    )


# ---- what a reader should know


def _fits_in_shards(run: Column, compared: list[Column], cards: dict[str, int]) -> list[str]:
    """That weights in shards fit the cards that whole ones do not, if so."""
    for column in compared:
        won = [card for card, usable in cards.items() if column.total_bytes <= usable < run.total_bytes]
        if column.names == IN_SHARDS and won:
            size = f"{column.total_bytes / 1e9:.1f} GB on each process"
            return [f"fits {', '.join(won)} with parallel=fsdp: {size}; parallel=auto takes it where ddp does not fit"]
    return []


def _notes_of(columns: list[Column], configs: list[TrainConfig], num_processes: int) -> list[str]:
    """The notes on all runs, those that are not on each with the names of their columns."""
    found: dict[str, list[str]] = {}
    for column, config in zip(columns, configs, strict=True):
        for note in notes(config, num_processes):
            found.setdefault(note, []).append(column.name)
    return [note if len(on) == len(columns) else f"{', '.join(on)}: {note}" for note, on in found.items()]


def notes(config: TrainConfig, num_processes: int) -> list[str]:
    """What the numbers of a run do not say by themselves, and what `sltrain-train` would refuse."""
    device = plan_device(config)
    dtype = weight_dtype(config, device)
    lines = []
    num_micro_batches = config.global_batch_size / (config.micro_batch_size * num_processes)
    if num_micro_batches != math.floor(num_micro_batches):
        lines.append(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size"
            f"={config.micro_batch_size} x {num_processes}: sltrain-train would refuse it"
        )
    lines += update_notes(config, num_processes)
    sharding = sharding_of(config, num_processes)
    num_shards = 1 if sharding is None else sharding.num_shards
    if config.checkpoint_async and (copied := host_bytes(config, planned_model(config, dtype), device, num_shards)):
        who = "each process" if num_shards > 1 and config.parallel.checkpoint == "sharded" else "rank 0"
        lines.append(f"checkpoint_async=true: {who} takes {copied / 1e9:.3f} GB of the host's memory")
    if config.compile:
        lines.append("compile=true: the compiler keeps and fuses what it likes; the plan is for the eager run")
    try:
        check_updates_of(config, dtype)
    except ValueError as error:
        lines.append(f"sltrain-train would refuse: {error}")
    return lines + [*config.optimizer.notes(device.type), *config.optimizer.warnings(torch.empty(0, dtype=dtype))]
