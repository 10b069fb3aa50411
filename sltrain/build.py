"""Config -> objects: the one file that sees every room, and what `sltrain-train` imports.

Read from top to bottom it is the start of a run: the folder, the corpus, its tokenizer and the streams of text (all
three in build_data.py), the model on the meta device, what the user should know before step 1, then real memory,
optimizer, and what a checkpoint remembers of them. Until the folder is claimed nothing is written, so bad input leaves
nothing behind. Checks that need more than one room are here.
"""

import dataclasses
import importlib.util
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sltrain.build_data import build_data, build_sources, build_tokenizer
from sltrain.build_memory import plan_model, settings_that_fit, update_notes
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig, check_batch, num_steps
from sltrain.data.evaluation import EvalSet
from sltrain.data.sources import Source
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.distributed import Ranks, pick_device
from sltrain.engine.loop import Cadence, Outcome, run_loop
from sltrain.engine.memory import PeakMemory, free_bytes
from sltrain.engine.metrics import JsonlSink, ProgressBar, Sink, WandbSink, rewrite_until
from sltrain.engine.per_layer_step import train_step_per_layer
from sltrain.engine.run_folder import RunFolder
from sltrain.engine.step import StepResult, train_step
from sltrain.engine.stop import StopRequest
from sltrain.engine.trainer import MAX_SKIPPED_IN_A_ROW, Progress, Trainer
from sltrain.errors import tell
from sltrain.layers import cpu_kernel
from sltrain.layers.cost import machine_kind, set_paths
from sltrain.methods import METHODS
from sltrain.methods.advice import warnings, weight_norms
from sltrain.methods.settings import MethodSettings
from sltrain.models.accounting import count_parameters, stored_bytes
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.models.memory_plan import MemoryPlan
from sltrain.optim.build import build_optimizer, check_optimizer, check_updates, set_learning_rate
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.optim.schedule import effective_warmup, warmup_cosine

__all__ = ["Outcome", "Run", "build_model", "build_run", "print_line"]

Report = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        with self.trainer.stop:
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
            self.trainer.stream.close()
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
        return not isinstance(self.trainer.data_error, ValueError)

    def say(self, line: str) -> None:
        """Print a line, on rank 0."""
        if self.ranks.is_main:
            print_line(line)

    def farewell(self, outcome: Outcome) -> str:
        """How the run ended and what to do next, in one or two lines."""
        assert self.trainer is not None
        c, step = self.config, self.trainer.step
        again = f"start the same command with run_dir={self.folder.path}"
        saved = f"saved at step {step:,}; to continue, {again}" if step else f"no update was made yet; {again}"
        if outcome is Outcome.FINISHED:
            return f"finished: {self.folder.path}"
        if outcome is Outcome.INTERRUPTED:
            return f"interrupted ({self.trainer.stop.signal_name or 'on another rank'}); {saved}"
        if outcome is Outcome.DATA_LOST:
            return f"the data could not be read any more; {saved}, once it can"
        if outcome is Outcome.OUT_OF_MEMORY:
            return self._out_of_memory()
        return (
            f"diverged: the loss or {MAX_SKIPPED_IN_A_ROW} updates in a row were not finite; lower lr (now {c.lr:g})"
            f" or alpha (now {c.alpha:g}), set grad_clip=1.0 (now {c.grad_clip}), or lengthen warmup_steps"
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
            f"out of memory after step {t.step:,}: {_gigabytes(t.planned_memory_bytes)} were planned for tensors;"
            f" {kept}; start the same command with run_dir={self.folder.path} and {smaller}"
        )


def build_run(config: TrainConfig, report: Report) -> Run:
    """Build everything a training run needs. Raises ValueError or OSError for what the user can mend."""
    ranks = Ranks.start(pick_device(config.device))
    say: Report = report if ranks.is_main else lambda line: None  # what all ranks know
    tell: Report = report if ranks.is_main else lambda line: report(f"[rank {ranks.rank}] {line}")  # what one rank met
    ranks.everywhere(lambda: check_machine(config, ranks))
    folder, is_finished = open_folder(config, ranks)
    cadence = Cadence(num_steps(config), config.log_every, config.eval_every, config.checkpoint_every)
    if is_finished:
        return Run(folder, ranks, config, None, cadence)

    source, validation = ranks.everywhere(lambda: build_sources(config, tell))
    tokenizer = build_tokenizer(config, source, ranks, say)
    model = ranks.everywhere(lambda: build_model(config, tokenizer.vocab_size, pick_dtype(config.dtype, ranks.device)))
    stream, eval_set = ranks.everywhere(lambda: build_data(config, source, validation, tokenizer, ranks, say))
    describe(config, model, source, tokenizer, eval_set, ranks, cadence, say)
    plan = ranks.everywhere(lambda: guard_memory(config, model, folder, ranks, say))
    plain = dataclasses.asdict(config)
    folder.path = ranks.on_main(lambda: folder.claim(plain, config.resume, CHANGEABLE_ON_RESUME, tokenizer.json))
    say(f"run folder {folder.path}")
    trainer = build_trainer(config, cadence, folder, model, stream, eval_set, ranks, plan, say, tell)
    return Run(folder, ranks, config, trainer, cadence)


def check_run(config: TrainConfig, dtype: torch.dtype) -> None:
    """Whether the ways of updating go together. Raises ValueError."""
    check_updates(
        config.optimizer.name,
        dtype=dtype,
        per_layer_update=config.per_layer_update,
        accumulation=config.accumulation,
        grad_clip=config.grad_clip,
        grad_clip_per_parameter=config.grad_clip_per_parameter,
        stochastic_rounding=config.stochastic_rounding,
    )


_COMPILING: dict[str, Callable[[TrainConfig], bool]] = {
    "compile=true": lambda config: config.compile,
    "optimizer=adam4bit": lambda config: config.optimizer.name == "adam4bit",
}


def check_machine(config: TrainConfig, ranks: Ranks) -> None:
    """What the configuration asks of the machine and of the number of ranks. Raises ValueError."""
    check_batch(config, ranks.world_size)
    check_optimizer(config.optimizer.name)
    check_run(config, pick_dtype(config.dtype, ranks.device))
    compiles = [text for text, does in _COMPILING.items() if does(config)]
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


def build_model(config: TrainConfig, vocab_size: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model with the method's layers in place, on the meta device: shapes without memory."""
    shape = dataclasses.replace(config.model, vocab_size=vocab_size)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape, activation_checkpointing=config.activation_checkpointing)
    model.to(dtype)
    settings = MethodSettings(
        rank=config.rank,
        sparsity=config.sparsity,
        alpha=config.alpha,
        support=config.support,
        block_size=config.block_size,
        rank_overrides=config.rank_overrides,
        sparsity_overrides=config.sparsity_overrides,
    )
    METHODS[config.method.name].replace(model, settings, is_projection)
    return model


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA, float32 on the CPU, where bfloat16 products are many times slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def describe(
    config: TrainConfig,
    model: nn.Module,
    source: Source,
    tokenizer: Tokenizer,
    eval_set: EvalSet,
    ranks: Ranks,
    cadence: Cadence,
    say: Report,
) -> None:
    """What the user should know before step 1."""
    c, count = config, {group: _short(number) for group, number in count_parameters(model).items()}
    positions = c.global_batch_size * c.seq_len
    passes = c.global_batch_size // (c.micro_batch_size * ranks.world_size)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    say(
        f"model      {c.model.name}, method {c.method.name}: {count['total']} parameters = {count['dense']} dense"
        f" + {count['low_rank']} low-rank + {count['sparse']} sparse"
    )
    processes = f"{ranks.world_size} process{'es' * (ranks.world_size > 1)}"
    say(
        f"update     {c.global_batch_size} sequences x {c.seq_len} = {positions:,} positions"
        f" ({passes} x {c.micro_batch_size} sequences on each of {processes})"
    )
    say(
        f"budget     {cadence.max_steps:,} updates = {cadence.max_steps * positions:,} positions;"
        f" lr {c.lr:g}, {c.optimizer.name}"
    )
    say(f"data       {source.name}, {c.padding}; tokenizer {c.tokenizer}, {tokenizer.vocab_size:,} ids")
    say(f"machine    {ranks.device}, {dtype}, {torch.get_num_threads()} CPU threads")
    if eval_set.exhausted:
        say(f"validation {eval_set.num_targets:,} tokens, all there is (eval_tokens={c.eval_tokens:,})")
    for line in [*warnings(model), *update_notes(config, ranks.world_size)]:
        say(f"note       {line}")


def guard_memory(
    config: TrainConfig, model: LlamaForCausalLM, folder: RunFolder, ranks: Ranks, say: Report
) -> MemoryPlan | None:
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
        say(f"memory     cannot be planned: {error}")
        return None
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= ranks.num_on_this_machine  # they share it
    say(f"memory     {_gigabytes(plan.total_bytes)} planned for tensors, {_gigabytes(free)} free on {device}")
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


def build_trainer(
    config: TrainConfig,
    cadence: Cadence,
    folder: RunFolder,
    model: LlamaForCausalLM,
    stream: TrainStream,
    eval_set: EvalSet,
    ranks: Ranks,
    plan: MemoryPlan | None,
    say: Report,
    tell: Report,
) -> Trainer:
    """Give the model memory and values, those of the newest checkpoint if there is one, and all it needs to train."""
    memory = PeakMemory(ranks.device)
    checkpointer = Checkpointer(folder.path, config.keep_last)
    checkpoint = ranks.on_main(lambda: checkpointer.find_latest(report=say))
    ranks.everywhere(lambda: allocate(model, ranks.device))
    if checkpoint is None:  # otherwise every value comes from there
        model.init_weights(config.seed)
    optimizer = build_updates(config, model, ranks)
    saved: dict[str, Any] = {}
    if checkpoint is not None:
        saved = ranks.everywhere(lambda: restore(checkpointer, checkpoint, model, optimizer, stream))
        ranks.on_main(lambda: folder.write_config(dataclasses.asdict(config)))
        say(f"resume     from step {saved['progress']['step']:,} ({checkpoint})")
    progress = Progress(**saved.get("progress", {}))
    arithmetic = fix_arithmetic(config, model, saved.get("arithmetic", {}), ranks.device, say)

    compiled: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    sinks: list[Sink] = []
    ranks.on_main(lambda: sinks.extend(build_sinks(config, folder, cadence.max_steps, progress.step, say)))
    return Trainer(
        model=compiled,
        train_model=compiled if config.per_layer_update else ranks.wrap(compiled),
        train_step=build_step(config),
        optimizer=optimizer,
        stream=stream,
        eval_set=eval_set,
        ranks=ranks,
        checkpointer=checkpointer,
        sinks=sinks,
        memory=memory,
        stop=StopRequest(),
        set_learning_rate=learning_rate_setter(config, cadence.max_steps, optimizer, say),
        micro_batch_size=config.micro_batch_size,
        seq_len=config.seq_len,
        updates_in_backward=config.per_layer_update,
        planned_memory_bytes=None if plan is None else plan.total_bytes,
        model_metrics=lambda: weight_norms(model),
        final_metrics={
            "peak_memory_measure": memory.measure,
            "num_parameters": count_parameters(model),
            "index_bytes": stored_bytes(model)["indices"],
        },
        report=tell,
        progress=progress,
        stream_state=saved.get("stream", {}),
        built_with={"arithmetic": arithmetic},
    )


def build_updates(config: TrainConfig, model: nn.Module, ranks: Ranks) -> torch.optim.Optimizer:
    """The optimizer; with per_layer_update, one that works inside backward and sums gradients over ranks itself."""
    optimizer = build_optimizer(
        model.named_parameters(),
        name=config.optimizer.name,
        lr=config.lr,
        betas=tuple(config.optimizer.betas),
        eps=config.optimizer.eps,
        weight_decay=config.weight_decay,
        device=ranks.device,
        stochastic_rounding=config.stochastic_rounding,
        accumulation=config.accumulation,
        seed=config.seed,
    )
    if not config.per_layer_update:
        return optimizer
    return PerLayerUpdate(
        optimizer,
        parameters=model.parameters(),
        reduce_grad=ranks.sum_,
        num_ranks=ranks.world_size,
        accumulation=config.accumulation,
        grad_clip_per_parameter=config.grad_clip_per_parameter,
    )


def build_step(config: TrainConfig) -> Callable[..., StepResult]:
    """The function that runs one update with what `build_updates` returns."""
    if config.per_layer_update:
        return train_step_per_layer
    return partial(train_step, grad_clip=config.grad_clip, grad_clip_per_parameter=config.grad_clip_per_parameter)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta memory on its device. Raises ValueError if there is not enough."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        model.to_empty(device=device)
    except RuntimeError as error:  # torch's allocators, out of memory
        raise ValueError(
            f"the model's {num_bytes / 1e9:,.1f} GB do not fit on {device}; choose a smaller one"
        ) from error


def restore(
    checkpointer: Checkpointer,
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: TrainStream,
) -> dict[str, Any]:
    """Set model, optimizer and stream to a checkpoint; return everything else that it holds."""
    state = checkpointer.load(checkpoint, model, optimizer)
    stream.load_state_dict(state["stream"])
    return state


def fix_arithmetic(
    config: TrainConfig, model: nn.Module, saved: dict[str, Any], device: torch.device, say: Report
) -> dict[str, Any]:
    """Choose how each W x is computed, as it was `saved` if the run is continued, say so, and return what to save."""
    num_rows = config.micro_batch_size * config.seq_len
    paths = set_paths(model, config.layer_path, num_rows, device, saved.get("layer_paths"))
    for path, how in (("factored", "through A, B and S"), ("composed", "through a dense W, built on the way")):
        count = sum(chosen == path for chosen in paths.values())
        if count:
            say(f"layers     {count} of {len(paths)} {path}: W x is computed {how}")
    machine = machine_kind(device, next(model.parameters()).dtype) if paths else None
    if saved.get("machine", machine) != machine:
        say(f"note       this run was computed on {saved['machine']}, it goes on on {machine}: not bit for bit")
    if paths and device.type == "cpu" and (reason := cpu_kernel.status()) is not None:
        say(f"note       {reason}")
    return {"layer_paths": paths, "machine": machine}


def learning_rate_setter(
    config: TrainConfig, max_steps: int, optimizer: torch.optim.Optimizer, say: Report
) -> Callable[[int], float]:
    """A function that sets the learning rate of a step and returns it."""
    warmup, shortened = effective_warmup(config.warmup_steps, max_steps)
    if shortened:
        say(f"note       {shortened}")

    def set_rate(step: int) -> float:
        factor = warmup_cosine(step, max_steps=max_steps, warmup_steps=warmup, min_lr_ratio=config.min_lr_ratio)
        set_learning_rate(optimizer, config.lr * factor)
        return config.lr * factor

    return set_rate


def build_sinks(config: TrainConfig, folder: RunFolder, max_steps: int, step: int, say: Report) -> list[Sink]:
    """Where rank 0 sends metrics; metrics.jsonl is first cut back to the step that the run continues from."""
    rewrite_until(folder.metrics_file, step)
    sinks: list[Sink] = [JsonlSink(folder.metrics_file), ProgressBar(max_steps, step)]
    if config.tracker.name == "wandb":
        sinks.append(
            WandbSink(
                folder.path,
                project=config.tracker.project,
                entity=config.tracker.entity,
                config=dataclasses.asdict(config),
                report=say,
            )
        )
    return sinks


def print_line(line: str) -> None:
    """Print a line above the progress bar."""
    tell(line, tqdm.write)
