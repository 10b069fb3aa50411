"""A configuration -> one run trained to its end, and how it ended."""

from dataclasses import dataclass
from pathlib import Path

from sltrain.api.farewell import farewell, what_is_left
from sltrain.building.run import Run, build_run
from sltrain.config import TrainConfig, num_steps
from sltrain.engine.distributed import is_lost_rank, why_lost
from sltrain.engine.loop import Cadence, Outcome, run_loop
from sltrain.engine.trainer import Trainer
from sltrain.errors import Interrupted, RankLost
from sltrain.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Ended:
    """How a run ended. `advice` says so, and what to do next, in one or two lines."""

    folder: Path
    outcome: Outcome
    advice: str
    is_saved: bool  # whether there is a checkpoint to continue from
    data_error: Exception | None = None  # what ended this rank's data


def train_run(config: TrainConfig) -> Ended:
    """Train until the budget is spent, or until a signal, the data, memory or non-finite numbers stop the run: see
    `Outcome`. An unfinished run in the folder is continued, a finished one is left unchanged. Raises ValueError or
    OSError for what the user can fix, before anything is trained, Interrupted if a signal ends it at once, and RankLost
    if another of its processes is gone."""
    cadence = Cadence(num_steps(config), config.log_every, config.eval_every, config.checkpoint_every)
    folder = RunFolder(Path(config.run_dir).expanduser()) if config.run_dir else None
    try:
        run = build_run(config)
        folder = run.folder
        with run.resources:
            if run.trainer is None:
                advice = f"the run in {folder.path} is finished, see summary.json; nothing to do"
                return Ended(folder.path, Outcome.FINISHED, advice, is_saved=True)
            with run.trainer.feed.stop:
                return _train(config, run, run.trainer, cadence)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise RankLost(
            f"another process of the run is gone ({why_lost(error)}): what it or torchrun says tells why;"
            f" {what_is_left(folder)[0].removeprefix('interrupted; ')}"
        ) from error
    except KeyboardInterrupt:
        raise Interrupted(*what_is_left(folder)) from None


def _train(config: TrainConfig, run: Run, trainer: Trainer, cadence: Cadence) -> Ended:
    outcome = run_loop(trainer, cadence)
    if outcome is not Outcome.FINISHED:
        trainer.note_stop(outcome.value)
    elif run.ranks.is_main:
        assert trainer.final is not None
        run.folder.finish(trainer.final)
    advice = farewell(config, trainer, run.folder.path, outcome)
    return Ended(run.folder.path, outcome, advice, trainer.saved_step > 0, trainer.feed.error)
