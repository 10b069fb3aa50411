"""Config -> run: what `sltrain-train` imports.

Read from top to bottom it is the start of a run: the folder, the corpus, its tokenizer and the streams of text (all
three in data.py), the model on the meta device (model.py), what the user should know before step 1, then
real memory, optimizer, and what a checkpoint remembers of them (trainer.py). Until the folder is claimed nothing
is written, so bad input leaves nothing behind. Checks that need more than one room are here.
"""

import dataclasses
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sltrain.building.data import build_data, build_sources, build_tokenizer
from sltrain.building.memory import plan_model, settings_that_fit, update_notes
from sltrain.building.model import build_model, dtype_name, pick_dtype
from sltrain.building.trainer import build_trainer, check_updates_of
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig, check_batch, num_steps
from sltrain.data.documents import Source
from sltrain.data.evaluation import EvalSet
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks, pick_device
from sltrain.engine.loop import Cadence, Outcome, run_loop
from sltrain.engine.memory import free_bytes
from sltrain.engine.trainer import MAX_SKIPPED_IN_A_ROW, Trainer
from sltrain.methods.advice import warnings
from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.accounting import count_parameters, sum_of_groups
from sltrain.planning.memory_plan import MemoryPlan
from sltrain.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to train; `trainer` is None when its folder holds a finished run."""

    folder: RunFolder
    ranks: Ranks
    config: TrainConfig
    trainer: Trainer | None
    cadence: Cadence

    def train(self) -> Outcome:
        """Train to the end, or until a signal, the data or the numbers stop it."""
        assert self.trainer is not None
        with self.trainer.feed.stop:
            outcome = run_loop(self.trainer, self.cadence)
        if outcome is not Outcome.FINISHED:
            self.trainer.note_stop(outcome.value)
        elif self.ranks.is_main:
            assert self.trainer.final is not None
            self.folder.finish(self.trainer.final)
        return outcome

    def close(self) -> None:
        """Stop the stream's thread, the sinks and the process group, and give the folder free."""
        if self.trainer is not None:
            self.trainer.feed.stream.close()
            for sink in self.trainer.sinks:
                sink.close()
        self.folder.release()
        self.ranks.stop()

    @property
    def is_finished(self) -> bool:
        """Whether the folder held a finished run; then there is nothing to train."""
        return self.trainer is None

    @property
    def lost_network(self) -> bool:
        """Whether the stream ended by the network, as far as this rank knows, and not by damaged data."""
        assert self.trainer is not None
        return not isinstance(self.trainer.feed.error, ValueError)

    def farewell(self, outcome: Outcome) -> str:
        """How the run ended and what to do next, in one or two lines."""
        assert self.trainer is not None
        c, step = self.config, self.trainer.step
        again = f"start the same command with run_dir={self.folder.path}"
        saved = f"saved at step {step:,}; to continue, {again}" if step else f"no update was made yet; {again}"
        if outcome is Outcome.FINISHED:
            return f"finished: {self.folder.path}"
        if outcome is Outcome.INTERRUPTED:
            return f"interrupted ({self.trainer.feed.stop.signal_name or 'on another rank'}); {saved}"
        if outcome is Outcome.DATA_LOST:
            return f"the data could not be read any more; {saved}, once it can"
        if outcome is Outcome.OUT_OF_MEMORY:
            return self._out_of_memory()
        alpha = c.method.columns().get("alpha")
        or_alpha = "" if alpha is None else f" or alpha (now {alpha:g})"
        return (
            f"diverged: the loss or {MAX_SKIPPED_IN_A_ROW} updates in a row were not finite; lower lr (now {c.lr:g})"
            f"{or_alpha}, set grad_clip=1.0 (now {c.grad_clip}), or lengthen warmup_steps"
            f" (now {c.warmup_steps:,}), in a new run_dir"
        )

    def _out_of_memory(self) -> str:
        """What was planned, what is saved, and what to start again with."""
        assert self.trainer is not None
        c, t = self.config, self.trainer
        one_pass = c.global_batch_size == c.micro_batch_size * self.ranks.world_size
        options = {
            f"micro_batch_size below {c.micro_batch_size}": c.micro_batch_size > 1,
            "activation_checkpointing=true": not c.activation_checkpointing,
            "per_layer_update=true": one_pass and c.grad_clip is None and not (c.per_layer_update or c.compile),
        }
        smaller = " or ".join(text for text, helps in options.items() if helps) or "a smaller model"
        kept = f"step {t.saved_step:,} is saved" if t.saved_step > 0 else "nothing was saved yet"
        return (
            f"out of memory after step {t.step:,}: {_gigabytes(t.memory.planned_bytes)} were planned for tensors;"
            f" {kept}; start the same command with run_dir={self.folder.path} and {smaller}"
        )


def build_run(config: TrainConfig) -> Run:
    """Build everything a training run needs. Raises ValueError or OSError for what the user can mend."""
    ranks = Ranks.start(pick_device(config.device))
    ranks.everywhere(lambda: check_machine(config, ranks))
    folder, is_finished = open_folder(config, ranks)
    cadence = Cadence(num_steps(config), config.log_every, config.eval_every, config.checkpoint_every)
    if is_finished:
        return Run(folder, ranks, config, None, cadence)

    source, validation = ranks.everywhere(lambda: build_sources(config))
    tokenizer = build_tokenizer(config, source, ranks)
    model = ranks.everywhere(lambda: build_model(config, tokenizer.vocab_size, pick_dtype(config.dtype, ranks.device)))
    stream, eval_set = ranks.everywhere(lambda: build_data(config, source, validation, tokenizer, ranks))
    describe(config, model, source, tokenizer, eval_set, ranks, cadence)
    plan = ranks.everywhere(lambda: guard_memory(config, model, folder, ranks))
    plain = dataclasses.asdict(config)
    folder.path = ranks.on_main(lambda: folder.claim(plain, config.resume, CHANGEABLE_ON_RESUME, tokenizer.json))
    logger.info(f"run folder {folder.path}")
    trainer = build_trainer(config, cadence, folder, model, stream, eval_set, ranks, plan)
    return Run(folder, ranks, config, trainer, cadence)


def check_machine(config: TrainConfig, ranks: Ranks) -> None:
    """What the configuration asks of the machine and of the number of ranks. Raises ValueError."""
    check_batch(config, ranks.world_size)
    config.optimizer.check_package()
    check_updates_of(config, pick_dtype(config.dtype, ranks.device))
    candidates = {"compile=true": config.compile, f"optimizer={config.optimizer.name}": config.optimizer.compiles}
    compiles = [text for text, does in candidates.items() if does]
    if compiles and ranks.device.type == "cpu":
        compiler = shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))[0]
        if shutil.which(compiler) is None:
            raise ValueError(
                f"{compiles[0]} on a CPU needs a C++ compiler, and there is no {compiler} on the PATH; install it, name"
                f" another one in CXX, or drop {compiles[0]}"
            )
    elif compiles and importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{compiles[0]} on a GPU needs Triton, which is not installed; pip install triton, or drop {compiles[0]}"
        )


def open_folder(config: TrainConfig, ranks: Ranks) -> tuple[RunFolder, bool]:
    """The run's folder and whether its run is finished, as rank 0 sees it; refused if it holds something else."""
    if config.run_dir is None:
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.model.name}_{config.method.name}"
        return RunFolder(Path("outputs", name), is_new=True), False
    folder = RunFolder(Path(config.run_dir).expanduser())

    def check() -> bool:
        folder.check(dataclasses.asdict(config), config.resume, CHANGEABLE_ON_RESUME)
        return folder.is_finished

    return folder, ranks.on_main(check)


def describe(
    config: TrainConfig,
    model: nn.Module,
    source: Source,
    tokenizer: Tokenizer,
    eval_set: EvalSet,
    ranks: Ranks,
    cadence: Cadence,
) -> None:
    """What the user should know before step 1."""
    c, counts = config, count_parameters(model)
    positions = c.global_batch_size * c.seq_len
    passes = c.global_batch_size // (c.micro_batch_size * ranks.world_size)
    dtype = dtype_name(next(model.parameters()).dtype)
    logger.info(
        f"model      {c.model.name}, method {c.method.name}: {_short(counts['total'])} parameters"
        f" = {sum_of_groups(counts, _short)}"
    )
    processes = f"{ranks.world_size} process{'es' * (ranks.world_size > 1)}"
    logger.info(
        f"update     {c.global_batch_size} sequences x {c.seq_len} = {positions:,} positions"
        f" ({passes} x {c.micro_batch_size} sequences on each of {processes})"
    )
    logger.info(
        f"budget     {cadence.max_steps:,} updates = {cadence.max_steps * positions:,} positions;"
        f" lr {c.lr:g}, {c.optimizer.name}"
    )
    logger.info(f"data       {source.name}, {c.padding}; tokenizer {c.tokenizer}, {tokenizer.vocab_size:,} ids")
    logger.info(f"machine    {ranks.device}, {dtype}, {torch.get_num_threads()} CPU threads")
    if eval_set.exhausted:
        logger.info(f"validation {eval_set.num_targets:,} tokens, all there is (eval_tokens={c.eval_tokens:,})")
    for line in [*warnings(model), *update_notes(config, ranks.world_size)]:
        logger.info(f"note       {line}")


def guard_memory(config: TrainConfig, model: LlamaForCausalLM, folder: RunFolder, ranks: Ranks) -> MemoryPlan | None:
    """Plan the run's memory and say what comes. Raises ValueError if it does not fit, or cannot be planned, and the
    guard is on."""
    device, dtype, vocab_size = ranks.device, model.lm_head.weight.dtype, model.lm_head.out_features

    def plan_of(changed: TrainConfig) -> MemoryPlan:
        return plan_model(changed, build_model(changed, vocab_size, dtype), device, ranks.world_size)

    try:
        plan = plan_of(config)
    except ValueError as error:
        if config.memory_guard:
            raise
        logger.info(f"memory     cannot be planned: {error}")
        return None
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= ranks.num_on_this_machine  # they share it
    logger.info(f"memory     {_gigabytes(plan.total_bytes)} planned for tensors, {_gigabytes(free)} free on {device}")
    if free is None or plan.total_bytes <= free or not config.memory_guard:
        return plan
    keys = CHANGEABLE_ON_RESUME if folder.has_progress else None
    found = settings_that_fit(config, plan_of, free, ranks.world_size, keys)
    advice = "a smaller model" if found is None else f"{found[0]} ({_gigabytes(found[1].total_bytes)})"
    raise ValueError(
        f"the run needs {_gigabytes(plan.total_bytes)} on {device}, where {_gigabytes(free)} are free; what would fit:"
        f" {advice}; memory_guard=off starts all the same, sltrain-plan shows where the memory goes"
    )


def _gigabytes(num_bytes: int | None) -> str:
    return "an unknown amount" if num_bytes is None else f"{num_bytes / 1e9:,.2f} GB"


def _short(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}K" if number else "0"
