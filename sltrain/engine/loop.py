"""The cadence of a run: when it steps, logs, evaluates, saves and stops; trainer.py defines how.

A run ends in one of five ways, and saves what was trained unless the updates themselves broke.
"""

from dataclasses import dataclass
from enum import Enum

from sltrain.engine.memory import is_out_of_memory
from sltrain.engine.trainer import Trainer


class Outcome(Enum):
    """How a run ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"  # by a signal; what was trained was saved
    DATA_LOST = "data lost"  # the stream broke; what was trained was saved
    OUT_OF_MEMORY = "out of memory"  # saved, unless an update broke off halfway
    DIVERGED = "diverged"  # too many updates in a row were not finite


@dataclass
class Cadence:
    """How often things happen, in updates; 0: never."""

    max_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int


def run_loop(trainer: Trainer, cadence: Cadence) -> Outcome:
    """Train from the trainer's step to `max_steps`, then evaluate once more and write the final line."""
    try:
        return _run_or_rescue(trainer, cadence)
    finally:
        trainer.close()


def _run_or_rescue(trainer: Trainer, cadence: Cadence) -> Outcome:
    try:
        outcome = _run(trainer, cadence)
        trainer.finish_save()
        return outcome
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    trainer.rescue()  # outside `except`: the error would keep the tensors of its frames
    return Outcome.OUT_OF_MEMORY


def _run(trainer: Trainer, cadence: Cadence) -> Outcome:
    def is_due(every: int) -> bool:
        return every > 0 and trainer.step > 0 and trainer.step % every == 0

    while True:
        is_last = trainer.step == cadence.max_steps
        # Evaluate before saving: the checkpoint then records it, and a resumed run does not evaluate again.
        if is_due(cadence.eval_every) and not is_last and trainer.progress.evaluated_step < trainer.step:
            trainer.evaluate("eval")
        if is_due(cadence.checkpoint_every) or is_last:
            trainer.save()
        if is_last:
            if not trainer.evaluate("final"):
                return Outcome.INTERRUPTED
            return Outcome.FINISHED if trainer.ended_finite else Outcome.DIVERGED
        update = trainer.next_update()
        if update.someone_lost_data or update.someone_stopped:
            if trainer.step > 0:
                trainer.save(in_background=False)
            return Outcome.DATA_LOST if update.someone_lost_data else Outcome.INTERRUPTED
        result = trainer.train(update)
        if trainer.step == 1 or trainer.step == cadence.max_steps or is_due(cadence.log_every):
            trainer.log(result)
        if trainer.has_diverged:
            return Outcome.DIVERGED
