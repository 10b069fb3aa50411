"""A configuration -> one run trained to its end, and how it ended."""

from dataclasses import dataclass
from pathlib import Path

from sltrain.api.farewell import farewell
from sltrain.building.run import build_run
from sltrain.config import TrainConfig, num_steps
from sltrain.engine.loop import Cadence, Outcome, run_loop


@dataclass(frozen=True)
class Ended:
    """How a run ended. `advice` says so, and what to do next, in one or two lines."""

    folder: Path
    outcome: Outcome
    advice: str
    data_error: Exception | None = None  # what ended this rank's data


def train_run(config: TrainConfig) -> Ended:
    """Train until the budget is spent, or until a signal, the data, memory or non-finite numbers stop the run: see
    `Outcome`. An unfinished run in the folder is continued, a finished one is left unchanged. Raises ValueError or
    OSError for what the user can fix, before anything is trained."""
    cadence = Cadence(num_steps(config), config.log_every, config.eval_every, config.checkpoint_every)
    run = build_run(config)
    with run.resources:
        folder, trainer = run.folder, run.trainer
        if trainer is None:
            advice = f"the run in {folder.path} is finished, see summary.json; nothing to do"
            return Ended(folder.path, Outcome.FINISHED, advice)
        with trainer.feed.stop:
            outcome = run_loop(trainer, cadence)
        if outcome is not Outcome.FINISHED:
            trainer.note_stop(outcome.value)
        elif run.ranks.is_main:
            assert trainer.final is not None
            folder.finish(trainer.final)
        ended = Ended(folder.path, outcome, farewell(config, trainer, folder.path, outcome), trainer.feed.error)
    return ended
