"""A saved model and a corpus -> its loss there, and downstream tasks -> their numbers, exactly as a run evaluates
itself.

Rows are cut as in training, unless `padding` says otherwise. A run without a corpus of its own choosing is measured on
its validation text, and the numbers are those of its own evaluation at that step.
"""

import logging
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from typing import Any

from tqdm.auto import tqdm

from sltrain.building.data import build_eval_set, build_validation_source
from sltrain.building.saved import Saved, open_saved
from sltrain.building.task_model import TaskModel
from sltrain.building.tasks import Tasks, evaluate_tasks
from sltrain.data.evaluation import EvalBatch, EvalSet
from sltrain.data.mixed_evaluation import MixedEvalSet
from sltrain.data.rows import check_row_shape, is_per_document
from sltrain.data.sources.local import LocalFiles
from sltrain.engine.distributed import Ranks, pick_device
from sltrain.engine.evaluate import counted, evaluate
from sltrain.events import TaskNumbers, published_perplexity
from sltrain.log import in_notebook

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # sequences, where no run says otherwise


def evaluate_saved(
    path: str | PathLike[str],
    globs: Sequence[str] | None = None,
    *,
    step: int | None = None,
    eval_tokens: int | None = None,
    batch_size: int | None = None,
    padding: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The numbers of `engine.evaluate` and the step, for the text of the files `globs` (None: the run's validation
    text) up to `eval_tokens` predicted tokens. `padding` (None: as trained) is pack or best_fit to read documents
    whole, or truncate_pad. `batch_size` (None: the run's micro_batch_size) changes perplexity_galore_protocol alone,
    which is left out where it says nothing (`events.published_perplexity`). Raises ValueError or OSError."""
    for name, number in {"eval-tokens": eval_tokens, "batch-size": batch_size}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: must be at least 1")
    saved = open_saved(path, step)
    if padding is not None:
        check_row_shape(padding, saved.seq_len)
        saved.padding = padding
    ranks = Ranks(0, 1, pick_device(device))
    eval_set = _eval_set(saved, globs, eval_tokens, batch_size, ranks)
    first = f"the first {saved.seq_len:,} tokens of each document"
    rows = {"truncate_pad": first, "pack": "packed rows", "best_fit": "rows packed by best fit"}[saved.padding]
    logger.info(
        f"evaluating {path}, step {saved.step:,}, on {eval_set.num_targets:,} tokens of {eval_set.source.name} ({rows})"
    )
    model = saved.load(ranks.device, num_rows=eval_set.batch_size * saved.seq_len)
    with closing(_shown(eval_set)) as batches:  # a bar that is interrupted ends too
        numbers = evaluate(model, batches, ranks, sources=eval_set.sources)
    assert numbers is not None
    del numbers["eval_processes"]  # one
    if published_perplexity(numbers) is None:
        del numbers["perplexity_galore_protocol"]
    return {**numbers, "step": saved.step}


def _shown(eval_set: EvalSet | MixedEvalSet) -> Generator[EvalBatch]:
    """The batches, while a bar or, without a terminal, a line now and then says how far they are."""
    is_hidden = False if in_notebook() else None  # None: where standard error is no terminal
    form = {"file": sys.stderr, "unit": " tok", "unit_scale": True, "disable": is_hidden, "leave": False}
    with tqdm(total=eval_set.num_targets, **form) as bar:
        if bar.disable:
            yield from counted(eval_set)
            return
        for number, batch in enumerate(eval_set, 1):
            yield batch
            bar.update(round(eval_set.num_targets * number / len(eval_set)) - bar.n)


def evaluate_saved_tasks(
    path: str | PathLike[str],
    names: Sequence[str],
    *,
    limit: int | None = None,
    step: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The numbers of downstream tasks, and the step. `names` are those of tasks or groups of lm-eval, or YAML files;
    `limit` (None: all) documents of each task are asked. `batch_size` rows of training (None: the run's
    micro_batch_size) are the positions of a pass at most. Raises ValueError or OSError."""
    for name, number in {"limit": limit, "batch-size": batch_size}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: must be at least 1")
    saved = open_saved(path, step)
    ranks = Ranks(0, 1, pick_device(device))
    tasks = Tasks(names, limit, key="--tasks")
    logger.info(f"evaluating {path}, step {saved.step:,}, on {tasks.describe()}")
    rows = batch_size or (BATCH_SIZE if saved.config is None else saved.config.micro_batch_size)
    max_positions = rows * saved.seq_len
    model = saved.load(ranks.device, num_rows=max_positions)
    numbers: TaskNumbers | None = evaluate_tasks(tasks, TaskModel(model, saved.tokenizer, ranks, max_positions))
    if not numbers:
        raise ValueError("no task could be evaluated; the warnings above say why")
    return {"tasks": numbers, "step": saved.step}


def _eval_set(
    saved: Saved,
    globs: Sequence[str] | None,
    eval_tokens: int | None,
    batch_size: int | None,
    ranks: Ranks,
) -> EvalSet | MixedEvalSet:
    """The rows of the files, or of the run's own validation text, read. Raises ValueError."""
    config = saved.config
    if globs:
        eval_set = EvalSet(
            LocalFiles(list(globs), on_bad_data="skip", key="--path"),
            saved.tokenizer,
            seq_len=saved.seq_len,
            padding=saved.padding,
            per_document=is_per_document(saved.padding, saved.attention),
            eval_tokens=eval_tokens or sys.maxsize,
            batch_size=batch_size or (BATCH_SIZE if config is None else config.micro_batch_size),
        )
        eval_set.read()
        return eval_set
    if config is None:
        raise ValueError(f"{saved.path} is an export and knows no corpus; add --path GLOB")
    config = replace(
        config,
        padding=saved.padding,
        eval_tokens=eval_tokens or config.eval_tokens,
        micro_batch_size=batch_size or config.micro_batch_size,
    )
    try:
        validation = build_validation_source(config)
        source = validation or config.data.open_training()
        own_set = build_eval_set(config, source, validation is None, saved.tokenizer, ranks)
        own_set.read()
    except (ValueError, OSError) as error:
        raise ValueError(f"name other text with --path GLOB, the run's own cannot be had: {error}") from error
    return own_set
