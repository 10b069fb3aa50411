"""What the user should know before the first update, a line a fact."""

import logging

import torch

from sltrain.building.memory import update_notes
from sltrain.building.model import precision_name
from sltrain.building.phases import structures, waiting_notes
from sltrain.config import TrainConfig, num_steps, rate_schedule
from sltrain.data.documents import Source
from sltrain.data.evaluation import EvalSet
from sltrain.data.mixed_evaluation import MixedEvalSet
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.methods.advice import warnings
from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.accounting import count_parameters, sum_of_groups
from sltrain.planning.roles import parameters_of

logger = logging.getLogger(__name__)


def describe(
    config: TrainConfig,
    model: LlamaForCausalLM,
    source: Source,
    tokenizer: Tokenizer,
    eval_set: EvalSet | MixedEvalSet,
    ranks: Ranks,
) -> None:
    """Log what will be trained, on what, for how long and where, and what about it may surprise."""
    c, counts, max_steps = config, count_parameters(model), num_steps(config)
    positions = c.global_batch_size * c.seq_len
    passes = c.global_batch_size // (c.micro_batch_size * ranks.world_size)
    processes = f"{ranks.world_size} processes, each" if ranks.world_size > 1 else "1 process,"
    micro_batches = f"{passes} micro-batch{'es' * (passes > 1)} of {c.micro_batch_size}"
    dtype = precision_name(model.lm_head.weight.dtype, model.compute_dtype)
    dtype = "float32 weights, bfloat16 arithmetic" if dtype == "mixed" else dtype
    threads = torch.get_num_threads()
    lines = [
        f"model      {c.model.name}, method {c.method.name}: {_short(counts['total'])} parameters"
        f" = {sum_of_groups(counts, _short)}",
        f"update     {c.global_batch_size} sequences x {c.seq_len} tokens = {positions:,} positions"
        f" ({processes} {micro_batches})",
        f"budget     {max_steps:,} updates = {max_steps * positions:,} positions; lr {c.lr:g}{_shape(c)},"
        f" {c.optimizer.name}{_rule(c)}",
        f"data       {source.name}, padding={c.padding}; tokenizer {c.tokenizer}, vocabulary {tokenizer.vocab_size:,}",
        f"machine    {ranks.device}, {dtype}, {threads} CPU thread{'s' if threads > 1 else ''}",
    ]
    if eval_set.exhausted:
        of = f"; all there is of {', '.join(short)}" if (short := eval_set.short_sources) else ", all there is"
        lines.append(f"validation {eval_set.num_targets:,} tokens{of} (eval_tokens={c.eval_tokens:,})")
    of_layers = dict.fromkeys(line for _, structure in structures(config, model) for line in warnings(structure))
    notes = [*of_layers, *update_notes(config, ranks.world_size), *c.optimizer.warnings(next(model.parameters()))]
    notes += waiting_notes(config, model)
    notes += _unused_scales(c, model)
    if c.ema is not None:
        notes.append(f"ema={c.ema:g}: evaluations and exports are of the averaged weights, train lines of the others")
    lines += [f"note       {note}" for note in notes]
    for line in lines:
        logger.info(line)


def _unused_scales(config: TrainConfig, model: LlamaForCausalLM) -> list[str]:
    """A line for each role in lr_scale that no parameter has in the course of the run."""
    if not config.lr_scale:
        return []
    roles = {info.role for _, structure in structures(config, model) for info in parameters_of(structure).values()}
    return [
        f"lr_scale={{{role}: {scale:g}}} changes nothing: with method={config.method.name} no parameter has this role"
        for role, scale in config.lr_scale.items()
        if role not in roles
    ]


def _shape(config: TrainConfig) -> str:
    """The schedule, unless it is the usual one."""
    if config.schedule == "wsd":
        return f" (wsd, decay over the last {rate_schedule(config).decay_steps:,})"
    return "" if config.schedule == "cosine" else f" ({config.schedule})"


def _rule(config: TrainConfig) -> str:
    """The parametrization, unless it is the usual one."""
    own = config.parametrization
    return "" if own.name == "paper" else f", parametrization {own.name} (base width {own.base_width})"


def _short(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}K" if number else "0"
