"""The state of a run and the five things the loop does with it: fetch, train, log, evaluate, save.

A trainer owns what must survive a restart besides weights and optimizer: the counters in `Progress` and the position
of the data stream after the last finished update. The stream itself runs ahead (it prefetches), therefore every batch
carries the position that follows it.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sltrain.engine.actions import Schedule, Stateful
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.distributed import Ranks
from sltrain.engine.evaluate import evaluate
from sltrain.engine.memory import RunMemory, held_by
from sltrain.engine.metrics import Sink, Throughput
from sltrain.engine.micro_batch import MicroBatch, make_micro_batch
from sltrain.engine.step import StepResult, UpdateStep
from sltrain.engine.stop import StopRequest

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10  # updates; after that many the weights cannot recover by skipping
MEASURED_UPDATE = 3  # of a process: the first makes the optimizer's state, the second DDP's final buckets
MAX_PROFILED_MICRO_BATCHES = 4  # of an update whose tensors are measured: each takes tens of thousands of records
STOP_CHECK_SECONDS = 1.0  # a stream that waits for the network must not keep a signal waiting


@dataclass
class Progress:
    """Counters of a run, saved with every checkpoint."""

    step: int = 0  # updates done, skipped ones included
    tokens: int = 0  # non-pad input tokens, all ranks
    positions: int = 0  # rows x seq_len, all ranks
    num_skipped_updates: int = 0
    num_skipped_in_a_row: int = 0
    num_skipped_tensors: int = 0  # of updates inside backward
    evaluated_step: int = 0  # last step with an eval line
    wall_seconds: float = 0.0  # all processes that worked on this run, one after the other


@dataclass
class Update:
    """The data of one update, as all ranks agree on it."""

    batch: Any  # this rank's rows; None when it has none
    num_tokens: int
    num_targets: int
    someone_stopped: bool
    someone_lost_data: bool


@dataclass
class Trainer:
    """Everything one run needs after it is built."""

    model: nn.Module  # not wrapped in DDP
    update_step: UpdateStep
    schedule: Schedule  # what the method does between updates
    objects: dict[str, Stateful]  # what a checkpoint holds besides the model: the optimizer, what actions keep
    stream: Any  # iterator of batches, with `wait` and `close`
    eval_set: Any  # iterable of batches, with `exhausted`
    ranks: Ranks
    checkpointer: Checkpointer
    sinks: list[Sink]
    memory: RunMemory
    stop: StopRequest
    set_learning_rate: Callable[[int], float]  # step -> the rate it set
    micro_batch_size: int
    model_metrics: Callable[[], dict[str, float]]  # what the method has to say about its weights
    final_metrics: Callable[[], dict[str, Any]]  # what the final line says besides the evaluation
    progress: Progress = field(default_factory=Progress)
    stream_state: dict[str, Any] = field(default_factory=dict)
    built_with: dict[str, Any] = field(default_factory=dict)  # choices that a continued run has to make again
    throughput: Throughput = field(default_factory=Throughput)
    final: dict[str, Any] | None = None  # the final line, once it is written
    data_error: Exception | None = None  # what ended this rank's stream

    def __post_init__(self) -> None:
        self.saved_step = self.progress.step or -1
        self.started = time.monotonic() - self.progress.wall_seconds
        self.lr = 0.0  # of the last update
        self.num_updates_here = 0  # by this process
        self.is_acting = False  # while actions have changed some weights and not yet others

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.update_step.optimizer

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def evaluated_step(self) -> int:
        return self.progress.evaluated_step

    @property
    def has_diverged(self) -> bool:
        return self.progress.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    @property
    def ended_finite(self) -> bool:
        """Whether the final evaluation gave a number: a run may end before it has skipped updates often enough."""
        return self.final is not None and math.isfinite(self.final["loss"])

    def next_update(self) -> Update:
        """Fetch this rank's rows and learn from all ranks how many tokens the update has and whether to go on."""
        batch, lost = None, False
        with self.throughput.waiting():
            try:
                while not self.stop.is_set and batch is None:
                    if self.stream.wait(STOP_CHECK_SECONDS):
                        batch = next(self.stream)
            except (ConnectionError, ValueError) as error:  # the network is gone, or on_bad_data=stop
                self.data_error, lost = error, True
        counts = [0, 0] if batch is None else [batch.num_tokens, batch.num_targets]
        num_tokens, num_targets, stopped, losses = self.ranks.sum([*counts, int(self.stop.is_set), int(lost)])
        return Update(batch, num_tokens, num_targets, stopped > 0, losses > 0)

    def train(self, update: Update) -> StepResult:
        """Run one update, advance the counters, and do what is due after it."""
        next_step = self.step + 1
        self.lr = self.set_learning_rate(next_step)
        result = self._measured(
            lambda: self.update_step.run(
                self._micro_batches(update.batch),
                update.num_targets,
                on_skip=lambda name: logger.warning(f"step {next_step}: {name} is not finite; this update is skipped"),
            ),
            num_micro_batches=-(-len(update.batch.input_ids) // self.micro_batch_size),
        )
        self.num_updates_here += 1
        self._count(update, result)
        self.stream_state = update.batch.state
        self.throughput.add(update.num_tokens)
        self._act()
        return result

    def _act(self) -> None:
        """Begin the phases and do the actions that are due after this step."""
        if self.schedule.is_due(self.step):
            self.optimizer.zero_grad()  # an action may need the memory, and a phase has other parameters
            self.is_acting = True
            self.schedule.run(self.step)
            self.is_acting = False

    def _count(self, update: Update, result: StepResult) -> None:
        """Advance the counters by one update, and tell what of it was left out."""
        progress = self.progress
        progress.step += 1
        progress.tokens += update.num_tokens
        progress.positions += update.batch.input_ids.numel() * self.ranks.world_size
        progress.num_skipped_updates += result.skipped
        num_left_out = result.num_skipped_tensors or 0
        progress.num_skipped_tensors += num_left_out
        if num_left_out and not result.skipped:
            logger.warning(f"step {progress.step}: {num_left_out} gradients were not finite and left out")
        is_bad = result.skipped or num_left_out > 0
        progress.num_skipped_in_a_row = progress.num_skipped_in_a_row + 1 if is_bad else 0

    def _measured(self, run: Callable[[], StepResult], num_micro_batches: int) -> StepResult:
        """Run an update, and measure its tensors if it is the one for that. On CUDA the allocator's mark is there
        anyway."""
        is_due = self.num_updates_here + 1 == MEASURED_UPDATE
        if self.ranks.device.type == "cuda" or not is_due or num_micro_batches > MAX_PROFILED_MICRO_BATCHES:
            return run()
        self.optimizer.zero_grad()  # what was there before must not be freed in between
        held = held_by(self.model, self.optimizer) + self.update_step.bucket_bytes
        result = self.memory.measure(run, held, self.ranks.device)
        measured, plan = self.memory.tensor_bytes or 0, self.memory.planned_bytes
        planned = "" if plan is None else f", {plan / 1e9:,.2f} planned"
        logger.info(f"memory     {measured / 1e9:,.2f} GB measured for tensors{planned}")
        return result

    def rescue(self) -> None:
        """After memory ran out: free what an update had begun, and save if the weights are whole. Ranks do not agree on
        running out, so nothing is saved where there are several."""
        is_whole = self.update_step.is_whole and not self.is_acting
        self.optimizer.zero_grad()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        if is_whole and self.step > 0 and self.ranks.world_size == 1:
            try:
                self.save()
            except (OSError, ValueError, RuntimeError) as error:
                logger.warning(f"step {self.step} could not be saved: {error}")

    def log(self, result: StepResult) -> None:
        """Write the train line of the current step."""
        left_out = (
            {} if result.num_skipped_tensors is None else {"num_skipped_tensors": self.progress.num_skipped_tensors}
        )
        line = {
            "loss": result.loss,
            "lr": self.lr,
            "grad_norm": result.grad_norm,
            **self.throughput.read(),
            **self.memory.numbers(self.ranks.gather),
            "num_skipped_updates": self.progress.num_skipped_updates,
            **left_out,
            **self.model_metrics(),
        }
        self._write("train", line)

    def evaluate(self, event: str) -> bool:
        """Write the eval or final line; False if a signal cut the evaluation short."""
        with self.throughput.paused():
            if event == "final":
                logger.info(f"final evaluation on {self.eval_set.num_targets:,} tokens ...")
            numbers = evaluate(self.model, self.eval_set, self.ranks, lambda: self.stop.is_set)
            if numbers is None:
                return False
            numbers["eval_exhausted"] = self.eval_set.exhausted
            self.progress.evaluated_step = self.step
            if event == "eval":
                self._write(event, numbers)
                return True
            self.final = self._write(
                event, {**numbers, **self.memory.numbers(self.ranks.gather), **self.final_metrics()}
            )
            return True

    def note_stop(self, outcome: str) -> None:
        """Write why the run ended before its budget: whoever reads the log later cannot ask."""
        with contextlib.suppress(OSError):  # the disk may be why
            self._write("stopped", {"outcome": outcome})

    def save(self) -> None:
        """Write a checkpoint of the current step, unless this step has one."""
        if self.saved_step == self.step:
            return
        with self.throughput.paused():
            self.progress.wall_seconds = time.monotonic() - self.started
            streams = {key: state for part in self.ranks.gather(self.stream_state) for key, state in part.items()}
            state = {"progress": asdict(self.progress), "stream": streams, **self.built_with}
            path = self.ranks.on_main(lambda: self.checkpointer.save(self.step, self.model, self.objects, state))
            self.saved_step = self.step
            self._write("checkpoint", {"path": str(path)})

    def _micro_batches(self, batch: Any) -> list[MicroBatch]:
        """The rows of this rank, in order, `micro_batch_size` at a time, on the device."""
        pieces = (tensor.split(self.micro_batch_size) for tensor in (batch.input_ids, batch.labels))
        return [make_micro_batch(ids, labels, self.ranks.device) for ids, labels in zip(*pieces, strict=True)]

    def _write(self, event: str, numbers: dict[str, Any]) -> dict[str, Any]:
        p = self.progress
        wall = round(time.monotonic() - self.started, 3)
        counters = {"step": p.step, "tokens": p.tokens, "positions": p.positions, "wall_seconds": wall}
        line = {"event": event, **counters, **numbers}
        for sink in self.sinks:
            sink.log(line)
        return line
