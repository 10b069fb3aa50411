"""How a run ended and what to do next, in words."""

import re
import shlex
from pathlib import Path

from sltrain.api.overrides import as_overrides
from sltrain.config import TrainConfig
from sltrain.engine.loop import Outcome
from sltrain.engine.trainer import MAX_SKIPPED_IN_A_ROW, Trainer
from sltrain.log import memory_size
from sltrain.runs.run_folder import RunFolder


def farewell(config: TrainConfig, trainer: Trainer, folder: Path, outcome: Outcome) -> str:
    """One or two lines for whoever started the run."""
    c, step = config, trainer.step
    again = f"to continue: {continuing(folder)}"
    saved = f"saved at step {step:,}" if step else "nothing was saved, as no update was made yet"
    if outcome is Outcome.FINISHED:
        return f"finished: {folder}"
    if outcome is Outcome.INTERRUPTED:
        return f"interrupted ({trainer.feed.stop.signal_name or 'on another rank'}); {saved}; {again}"
    if outcome is Outcome.DATA_LOST:
        return f"the data could not be read any more; {saved}; once it can, {again}"
    if outcome is Outcome.OUT_OF_MEMORY:
        return _out_of_memory(config, trainer, again)
    alpha = c.method.columns().get("alpha")
    or_alpha = "" if alpha is None else f" or alpha (now {alpha:g})"
    return (
        f"diverged: the loss or {MAX_SKIPPED_IN_A_ROW} updates in a row were not finite; lower lr (now {c.lr:g})"
        f"{or_alpha}, set grad_clip=1.0 (now {c.grad_clip}), or lengthen warmup_steps"
        f" (now {c.warmup_steps:,}), in a new run_dir"
    )


def what_is_left(folder: RunFolder | None) -> tuple[str, bool]:
    """What to say after a signal ended a run at once, and whether its folder, if it has one, holds a checkpoint."""
    if folder is None or not folder.has_checkpoint:
        return "interrupted; nothing was saved", False
    newest = max(folder.path.glob("checkpoints/step_*[0-9]"), default=None)
    step = "a step" if newest is None else f"step {int(newest.name.removeprefix('step_')):,}"
    return f"interrupted; {step} is saved: to continue: {continuing(folder.path)}", True


def continuing(folder: Path) -> str:
    """The command that continues the run in a folder, to be pasted into a shell."""
    is_plain = re.fullmatch(r"[A-Za-z0-9@%+./_-]+", str(folder))
    override = f"run_dir={folder}" if is_plain else shlex.quote(as_overrides({"run_dir": folder})[0])
    return f"sltrain-train {override}"


def _out_of_memory(config: TrainConfig, trainer: Trainer, again: str) -> str:
    """What was planned, what is saved, and what to start again with."""
    c, t = config, trainer
    one_pass = c.global_batch_size == c.micro_batch_size * t.ranks.world_size
    options = {
        f"micro_batch_size below {c.micro_batch_size}": c.micro_batch_size > 1,
        "activation_checkpointing=true": not c.activation_checkpointing,
        "checkpoint_async=false": c.checkpoint_async and t.ranks.device.type == "cpu",
        "per_layer_update=true": one_pass and c.grad_clip is None and not (c.per_layer_update or c.compile),
    }
    smaller = " or ".join(text for text, helps in options.items() if helps) or "a smaller model"
    kept = f"step {t.saved_step:,} is saved" if t.saved_step > 0 else "nothing was saved yet"
    return (
        f"out of memory after step {t.step:,}: {memory_size(t.memory.planned_bytes)} were planned for tensors;"
        f" {kept}; {again} with {smaller}"
    )
