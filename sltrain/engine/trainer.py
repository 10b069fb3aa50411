"""The state of a run, and how the loop's steps are carried out: train, log, evaluate, save.

A trainer owns what must survive a restart besides weights and optimizer: the counters in `Progress`, and in its feed
the position of the data stream after the last finished update.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn

from sltrain.engine.actions import Schedule, Stateful
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.ema import Average
from sltrain.engine.evaluate import counted, evaluate
from sltrain.engine.memory import RunMemory, averages_bytes, held_by
from sltrain.engine.metrics import Sink, Throughput
from sltrain.engine.micro_batch import Feed, Update
from sltrain.engine.profile import Profile
from sltrain.engine.saving import LONG_WAIT_SECONDS, Save, Saves
from sltrain.engine.step import StepResult, UpdateStep
from sltrain.engine.strategy import Strategy
from sltrain.engine.watch import ENDLESS
from sltrain.events import Event, TaskNumbers

logger = logging.getLogger(__name__)

FIRST_UPDATE = 1200.0  # seconds beyond hang_timeout: torch.compile works in it
MAX_SKIPPED_IN_A_ROW = 10  # updates; after that many, skipping does not help any more


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
    wall_seconds: float = 0.0  # of all processes that continued this run, one after the other

    def count(self, update: Update, result: StepResult, num_positions: int) -> None:
        """Advance by one update."""
        self.step += 1
        self.tokens += update.num_tokens
        self.positions += num_positions
        self.num_skipped_updates += result.skipped
        self.num_skipped_tensors += result.num_skipped_tensors or 0
        is_bad = result.skipped or bool(result.num_skipped_tensors)
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if is_bad else 0


@dataclass
class Trainer:
    """Everything one run needs after it is built."""

    model: nn.Module  # as evaluations and checkpoints take it, not as the strategy wraps it
    update_step: UpdateStep
    schedule: Schedule  # what the method does between updates
    objects: dict[str, Stateful]  # what a checkpoint saves besides the model: the optimizer, what actions keep
    feed: Feed
    eval_set: Any  # see data/evaluation.py
    strategy: Strategy
    saves: Saves
    sinks: list[Sink]
    memory: RunMemory
    set_learning_rate: Callable[[int], float]  # step -> the rate it set
    model_metrics: Callable[[], dict[str, float]]  # the method's numbers of its weights, for the train line
    speed_metrics: Callable[[float], dict[str, float]]  # tokens a second -> the train line's tflops and mfu
    final_metrics: Callable[[], Event]  # the final line's numbers besides the evaluation
    progress: Progress = field(default_factory=Progress)
    built_with: dict[str, Any] = field(default_factory=dict)  # choices that a continued run must repeat
    throughput: Throughput = field(default_factory=Throughput)
    profile: Profile | None = None  # the updates to record, on rank 0
    # What evaluates downstream tasks, given what says whether to stop; None if it was stopped
    tasks: Callable[[Callable[[], bool]], TaskNumbers | None] | None = None
    final: Event | None = None  # the final line, once written

    def __post_init__(self) -> None:
        self.started = time.monotonic() - self.progress.wall_seconds
        self.lr = 0.0  # of the last update
        self._may_compile = True  # in the next update
        self._num_updates = 0  # of this process, or since a phase began
        self.source_tokens: dict[str, int] = {}  # of a mixture, read in this rank's streams until the last update

    @property
    def ranks(self) -> Ranks:
        return self.strategy.ranks

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def saved_step(self) -> int:
        """Of the newest checkpoint on the disk, as far as this rank knows; below 1: none."""
        return self.saves.saved_step

    @property
    def has_diverged(self) -> bool:
        return self.progress.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    @property
    def ended_finite(self) -> bool:
        """Whether the final evaluation gave a number: a run may end before it has skipped updates often enough."""
        return self.final is not None and math.isfinite(self.final["loss"])

    def next_update(self) -> Update:
        """The data of the next update, and whether some rank has to stop. Raises CheckpointError if a save in the
        background has failed since the last update."""
        self._note(self.saves.written())
        number = self.step + 1
        self.ranks.at(f"the text of update {number}", ENDLESS)  # the network may be slow
        with self.throughput.waiting():
            batch = self.feed.fetch()
        self.ranks.at(f"update {number}", FIRST_UPDATE if self._may_compile else 0.0)
        update = self.feed.agree(batch, self.saves.has_failed)
        if update.someone_failed_to_save:
            self.finish_save()
        return update

    def train(self, update: Update) -> StepResult:
        """Make one update, advance the counters, and begin the phases and apply the actions that are due."""
        step = self.step + 1
        self.lr = self.set_learning_rate(step)
        num_rows = len(update.batch.input_ids)
        self._reserve()

        def run() -> StepResult:
            return self.update_step.run(
                self.feed.micro_batches(update.batch),
                update.num_targets,
                on_skip=lambda name: logger.warning(f"step {step}: {name} is not finite; this update is skipped"),
                before_step=lambda: self.schedule.before_step(step),
            )

        if self.profile is not None and self.profile.covers(step):  # measured memory takes the profiler too
            result = self.profile.record(step, run)
        else:
            num_micro_batches = -(-num_rows // self.feed.micro_batch_size)
            result = self.memory.measure(run, self._held_bytes, num_micro_batches)
        self._may_compile = False
        self._num_updates += 1
        self.progress.count(update, result, update.batch.input_ids.numel() * self.ranks.world_size)
        if result.num_skipped_tensors and not result.skipped:
            logger.warning(f"step {step}: {result.num_skipped_tensors} gradients were not finite and are skipped")
        self.feed.state, self.source_tokens = update.batch.state, update.batch.source_tokens
        self.throughput.add(update.num_tokens)
        if self.schedule.is_due(step):
            self.ranks.at(f"what follows update {step}", ENDLESS)  # decompositions, another structure
            self.update_step.optimizer.zero_grad()  # an action may need the memory, and a phase has other parameters
            self.schedule.run(step, lambda: self.feed.micro_batches(update.batch))
            self._may_compile = True
        return result

    def measure_anew(self) -> None:
        """A phase has begun: its updates may need other memory."""
        self.memory.num_updates = 0
        self._num_updates = 0

    def _reserve(self) -> None:
        """Once a process or phase, find the memory for copies of what is saved: when the optimizer has its state, and
        before the update that is measured. All ranks do so in the same update."""
        if self.saves.in_background and self._num_updates == 1:
            self.saves.reserve(self._contents({}))

    def _held_bytes(self) -> int:
        """What is held before an update, which must not free gradients of the one before while it is measured."""
        self.update_step.optimizer.zero_grad()
        own = held_by(self.model, self.update_step.optimizer, self.strategy) + self.update_step.bucket_bytes
        return own + averages_bytes(self.schedule.actions) + self.saves.host.nbytes

    def _averaged(self) -> AbstractContextManager[None]:
        """With `ema`, the context in which the model has its averaged weights."""
        averages = [action.state for action in self.schedule.actions if isinstance(action.state, Average)]
        return averages[0].in_model() if averages else contextlib.nullcontext()

    def rescue(self) -> None:
        """After running out of memory: free the gradients, and save if the weights are those of a whole update. With
        several ranks nothing is saved: not all of them ran out."""
        is_whole = self.update_step.is_whole and not self.schedule.is_acting
        self.update_step.optimizer.zero_grad()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.ranks.world_size > 1:
            return
        try:
            self.finish_save()
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning(str(error))
        self.saves.free()
        if is_whole and self.step > 0:
            try:
                self.save(in_background=False)
            except (OSError, ValueError, RuntimeError) as error:
                logger.warning(f"step {self.step} could not be saved: {error}")

    def log(self, result: StepResult) -> None:
        """Write the train line of the current step."""
        speed = self.throughput.read()
        numbers: Event = {
            "loss": result.loss,
            "lr": self.lr,
            "grad_norm": result.grad_norm,
            **speed,
            **cast(Event, self.speed_metrics(speed["tokens_per_second"])),
            **self.memory.numbers(self.ranks.gather),
            "num_skipped_updates": self.progress.num_skipped_updates,
        }
        if result.num_skipped_tensors is not None:
            numbers["num_skipped_tensors"] = self.progress.num_skipped_tensors
        self._write("train", numbers, {**self.model_metrics(), **self._source_tokens()})

    def _source_tokens(self) -> dict[str, int]:
        """Of a mixture: the tokens of each source that all ranks have trained on."""
        own = self.source_tokens
        totals = self.ranks.sum(list(own.values())) if own else []
        return {f"tokens/{name}": total for name, total in zip(own, totals, strict=True)}

    def evaluate(self, event: str) -> bool:
        """Write the eval or final line; False if a signal interrupted the evaluation."""
        self.ranks.at(f"the evaluation at step {self.step}", ENDLESS)
        with self.throughput.paused():
            if event == "final":
                logger.info(f"final evaluation on {self.eval_set.num_targets:,} tokens ...")
            with self._averaged():
                batches, sources = counted(self.eval_set), self.eval_set.sources
                numbers = evaluate(
                    self.model,
                    batches,
                    self.ranks,
                    lambda: self.feed.stop.is_set,
                    sources,
                    in_step=self.strategy.is_sharded,
                )
                self.strategy.after_forward(self.model)
                if numbers is not None and self.tasks is not None:
                    of_tasks = self.tasks(lambda: self.feed.stop.is_set)
                    numbers = None if of_tasks is None else {**numbers, **({"tasks": of_tasks} if of_tasks else {})}
            if numbers is None:
                return False
            numbers["eval_exhausted"] = self.eval_set.exhausted
            self.progress.evaluated_step = self.step
            if event == "eval":
                self._write(event, numbers)
                return True
            numbers.update(self.memory.numbers(self.ranks.gather))
            numbers.update(self.final_metrics())
            self.finish_save()  # a run without its last checkpoint is not finished
            self.final = self._write(event, numbers)
            return True

    def note_stop(self, outcome: str) -> None:
        """Write why the run ended before its budget, for later readers of the log."""
        with contextlib.suppress(OSError):  # the disk may be the cause
            self._write("stopped", {"outcome": outcome})

    def save(self, in_background: bool = True) -> None:
        """Save the current step, unless that was begun; if not `in_background`, it is on the disk afterwards. Raises
        CheckpointError if this save fails, or the one before it did."""
        self.ranks.at(f"the checkpoint of step {self.step}", ENDLESS)
        with self.feed.stop.shielded(), self.throughput.paused():
            if self.saves.begun_step != self.step:
                save = Save(self.step, self.progress.tokens, self.progress.positions)
                self._finish_last(save)
                self.progress.wall_seconds = time.monotonic() - self.started
                streams = {key: state for part in self.ranks.gather(self.feed.state) for key, state in part.items()}
                state = {"progress": asdict(self.progress), "stream": streams, **self.built_with}
                self.saves.begin(save, self._contents(state), in_background)
            if not (in_background and self.saves.in_background):
                self._note(self.saves.finish())

    def finish_save(self) -> None:
        """Wait for the save that goes on in the background, if one does. Raises CheckpointError if it failed."""
        self.ranks.at("a checkpoint in the background", ENDLESS)
        with self.feed.stop.shielded():
            self._note(self.saves.finish())

    def close(self) -> None:
        """Finish what is being written, however the run ended. Raises nothing."""
        with self.feed.stop.shielded(), contextlib.suppress(OSError):
            self._note(self.saves.close())

    def _contents(self, state: Mapping[str, Any]) -> Contents:
        """What those who write it put into a checkpoint of the present step. All ranks call it."""
        return self.strategy.for_checkpoint(self.step, self.model, self.objects, state)

    def _finish_last(self, save: Save) -> None:
        """Wait for the save before this one, and say so if that took long: the disk is slower than the saves come."""
        before = self.saves.begun_step
        self._note(self.saves.finish())
        if (seconds := time.perf_counter() - save.began) > LONG_WAIT_SECONDS:
            logger.info(
                f"note       step {self.step:,} waited {seconds:.1f} s for the checkpoint of step {before:,}; with a"
                " higher checkpoint_every it would not"
            )

    def _note(self, save: Save | None) -> None:
        """Write the line of a checkpoint that is on the disk, at the step that it holds."""
        if save is None:
            return
        seconds = {"blocked_seconds": round(save.blocked_seconds, 4), "save_seconds": round(save.seconds, 4)}
        at: Event = {"step": save.step, "tokens": save.tokens, "positions": save.positions}
        self._write("checkpoint", {**at, "path": str(save.path), **cast(Event, seconds)})
        if self.saves.in_background:
            logger.info(
                f"checkpoint of step {save.step:,} saved: training waited {save.blocked_seconds:.2f} s of"
                f" {save.seconds:.2f} s"
            )

    def _write(self, event: str, numbers: Event, of_method: Mapping[str, float] | None = None) -> Event:
        p = self.progress
        line: Event = {
            "event": event,
            "step": p.step,
            "tokens": p.tokens,
            "positions": p.positions,
            "wall_seconds": round(time.monotonic() - self.started, 3),
            **numbers,
            **cast(Event, of_method or {}),
        }
        for sink in self.sinks:
            sink.log(line)
        return line
