"""Configuration -> memory plan, beside dense training, GaLore and the published SLTrain layout.

Nothing is allocated and no GPU is touched: models are built on the meta device. Only `measure=true` trains, three
updates on random tokens, on the machine it runs on.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from sltrain.api.plan_config import PlanConfig, card_bytes, card_name, chosen_cards
from sltrain.api.plan_table import Column, Groups, Plan
from sltrain.building.memory import optimizer_state_bytes, plan_model, update_notes, update_shape, update_temporaries
from sltrain.building.model import allocate, build_model, dtype_name, weight_dtype
from sltrain.building.phases import Live, live_actions
from sltrain.building.trainer import build_step, build_updates, check_updates_of
from sltrain.compose import with_plugin
from sltrain.config import TrainConfig
from sltrain.engine.distributed import Ranks, pick_device
from sltrain.engine.memory import averages_bytes, free_bytes, held_by, tensor_peak
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.layers import ReplacedLinear, set_paths
from sltrain.models.llama import LlamaForCausalLM
from sltrain.optim.build import member_for
from sltrain.planning.accounting import count_parameters, stored_bytes
from sltrain.planning.layouts import galore_state_bytes, paper_groups, paper_millions, published_stored_bytes
from sltrain.planning.memory_plan import MemoryPlan, plan_memory

logger = logging.getLogger(__name__)

PUBLISHED = "published SLTrain"  # the name of its column
NUM_MEASURED_UPDATES = 3  # the first makes the optimizer's state, the last is measured


def build_plan(plan: PlanConfig, config: TrainConfig) -> Plan:
    """The plan. Raises ValueError for what cannot be planned."""
    cards = {card_name(card): card_bytes(card) - int(plan.reserve_gb * 1e9) for card in chosen_cards(plan)}
    config = replace(config, model=replace(config.model, vocab_size=vocab_size(config)))
    if plan.paper_convention:
        return Plan(paper_columns(config), cards, plan.reserve_gb, _headline(config, "as the SLTrain paper counts"), [])
    # A plan is for a card unless device=cpu is asked for; what is measured is measured here.
    device = pick_device(config.device) if plan.measure else torch.device("cpu" if config.device == "cpu" else "cuda")
    dtype = weight_dtype(config, device)
    columns, highest = run_columns(config, device, dtype, plan.num_processes)
    shown = "mixed precision" if config.precision == "mixed" else dtype_name(dtype)
    if plan.measure:
        check_free(columns[0].total_bytes, device)
        logger.info(f"measuring {NUM_MEASURED_UPDATES} updates on random tokens on {device} ...")
    where = f"{device.type}, {shown}, {config.micro_batch_size} x {config.seq_len} tokens"
    headline = f"{_headline(config, where)}; highest during: {highest}"
    measured = measure(config, device, dtype) if plan.measure else None
    return Plan(
        columns, cards, plan.reserve_gb, headline, notes(config, device, dtype, plan.num_processes, columns), measured
    )


def _headline(config: TrainConfig, how: str) -> str:
    return f"{config.model.name}, {config.method.name}, {how}"


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


# ---- columns


def run_columns(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, num_processes: int
) -> tuple[list[Column], str]:
    """This run; then with the same settings dense training, GaLore and, if the model stores positions of S, the
    published layout; and the stage at which this run needs most."""
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, dtype)
    own = plan_model(config, model, device, num_processes)
    dense = build_model(as_dense(config), config.model.vocab_size, dtype)
    of_dense = plan_model(as_dense(config), dense, device, num_processes)
    shape = update_shape(config, device, model, num_processes)

    columns = [_column("this run", model, own)]
    if has_replaced_linears(model):
        columns.append(_column("method=full", dense, of_dense))
    if config.rank > 0:
        galore = galore_state_bytes(
            dense, config.rank, lambda info: member_for(config.optimizer, info).state_bytes(info)
        )
        at_work = update_temporaries(config, dense, device)
        columns.append(_column(f"GaLore, rank {config.rank}", dense, plan_memory(dense, shape, galore, None, at_work)))
    if stored_bytes(model)["indices"]:
        set_paths(model, "composed", shape.num_rows, device)
        stored = published_stored_bytes(model)
        at_work = update_temporaries(config, model, device)
        published = plan_memory(model, shape, optimizer_state_bytes(config, model), stored, at_work)
        columns.append(_column(PUBLISHED, model, published))
    return columns, f"{own.stage}, in phase {own.phase}" if own.phase else own.stage


def as_dense(config: TrainConfig) -> TrainConfig:
    return with_plugin(config, "method", "full")


def has_replaced_linears(model: LlamaForCausalLM) -> bool:
    """Whether it is another model than the dense one."""
    return any(isinstance(module, ReplacedLinear) for module in model.modules())


def paper_columns(config: TrainConfig) -> list[Column]:
    """Parameters, positions and moments as the paper's table 2 counts them."""
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, torch.bfloat16)
    dense = build_model(as_dense(config), config.model.vocab_size, torch.bfloat16)
    columns = [_paper_column("this run", model, paper_groups(model))]
    if has_replaced_linears(model):
        columns.append(_paper_column("method=full", dense, paper_groups(dense)))
    if config.rank > 0:
        columns.append(_paper_column(f"GaLore, rank {config.rank}", dense, paper_groups(dense, config.rank)))
    return columns


def _column(name: str, model: LlamaForCausalLM, plan: MemoryPlan) -> Column:
    return Column(name, plan.groups, count_parameters(model)["total"])


def _paper_column(name: str, model: LlamaForCausalLM, groups: Groups) -> Column:
    return Column(name, groups, count_parameters(model)["total"], str(paper_millions(model)))


# ---- what a reader should know


def notes(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, num_processes: int, columns: list[Column]
) -> list[str]:
    """What the numbers do not say by themselves, and what `sltrain-train` would refuse."""
    lines = []
    num_micro_batches = config.global_batch_size / (config.micro_batch_size * num_processes)
    if num_micro_batches != math.floor(num_micro_batches):
        lines.append(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size"
            f"={config.micro_batch_size} x {num_processes}: sltrain-train would refuse it"
        )
    lines += update_notes(config, num_processes)
    if config.compile:
        lines.append("compile=true: the compiler keeps and fuses what it likes; the plan is for the eager run")
    try:
        check_updates_of(config, dtype)
    except ValueError as error:
        lines.append(f"sltrain-train would refuse: {error}")
    lines += [*config.optimizer.notes(device.type), *config.optimizer.warnings(torch.empty(0, dtype=dtype))]
    if any(column.name == PUBLISHED for column in columns):
        lines.append(f"GaLore and {PUBLISHED}: their weights, positions and moments, with our activations")
    else:
        lines.append("GaLore: its moments, with our activations")
    return lines


# ---- measuring


def check_free(planned_bytes: int, device: torch.device) -> None:
    """Raise ValueError if what is to be measured does not fit into the memory that is free."""
    free = free_bytes(device)
    if free is not None and planned_bytes > free:
        raise ValueError(
            f"measure=true would need {planned_bytes / 1e9:,.2f} GB on {device}, where {free / 1e9:,.2f} are free;"
            " make micro_batch_size smaller, and global_batch_size with it"
        )


def measure(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> int:
    """The peak of tensor bytes in one update of the real model on random tokens."""
    config.optimizer.check_package()
    check_updates_of(config, dtype)
    ranks = Ranks(0, 1, device)
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, dtype)
    set_paths(model, config.layer_path, config.micro_batch_size * config.seq_len, device)
    allocate(model, device)
    model.init_weights(config.seed)
    optimizer = build_updates(config, model, ranks)
    step = build_step(config, model, optimizer, ranks)
    vocab = model.lm_head.out_features
    source = torch.Generator().manual_seed(config.seed)

    def update() -> Any:
        num_micro_batches = max(1, config.global_batch_size // config.micro_batch_size)
        shape = (config.micro_batch_size, config.seq_len)
        rows = [torch.randint(vocab, shape, generator=source) for _ in range(num_micro_batches)]
        places = [torch.arange(config.seq_len).expand(shape)] if config.attention == "document" else []
        micro_batches = [make_micro_batch(ids, ids, device, *places) for ids in rows]
        return step.run(micro_batches, sum(ids.numel() for ids in rows))

    for _ in range(NUM_MEASURED_UPDATES - 1):
        update()
    optimizer.zero_grad()
    held = held_by(model, optimizer) + averages_bytes(live_actions(config, model, Live(optimizer)))
    _, peak = tensor_peak(update, held, device)
    return peak
