"""The numbers of a run. An event is a line of metrics.jsonl: a dict of plain numbers, whose keys and units are here.

    train               now and then during training
    eval, final         an evaluation on the validation text; the final one ends a finished run, and is summary.json
    checkpoint          a checkpoint was written, of `step`; with checkpoint_async maybe some updates later
    stopped             the run ended before its budget

The type checker holds the writer (engine/trainer.py) and the readers (runs/run_record.py, reporting/rows.py) to it. A
run folder may come from another version, so readers must do without any key. A number that is not finite is null in the
file; one that can diverge is then read as NaN.
"""

from typing import Annotated, TypedDict, get_type_hints

TaskNumbers = dict[str, dict[str, float]]  # task or group of eval_tasks -> metric, or metric_stderr -> value
Diverging = Annotated[float, "null in the file, and NaN when read, where it is not finite"]


class Event(TypedDict, total=False):
    """One line. Parentheses name the events that have a key; without them, all have it."""

    event: str  # train, eval, final, checkpoint or stopped
    step: int  # updates done, skipped ones included
    tokens: int  # trained on so far, pads left out, all ranks (data=mix, train: and `tokens/NAME` of each source)
    positions: int  # trained on so far, rows x row length, pads included, all ranks
    wall_seconds: float  # of all processes that worked on the run, one after the other, evaluations included

    loss: Diverging  # nats a token (train: of this update; eval, final: of the whole validation text, with data=mix
    # and `loss/NAME` of each source, of `eval_tokens/NAME` tokens; null where it is not finite)
    lr: float  # of this update (train)
    grad_norm: Diverging  # before clipping (train)
    tokens_per_second: float  # since the last such line, outside evaluation and saving, all ranks (train)
    tflops: float  # of model arithmetic at that speed, on each device, see planning/flops.py (train)
    mfu: float  # tflops over the device's peak, where that is known (train)
    data_wait_fraction: float  # of that time: rank 0 waited for rows (train)
    num_skipped_updates: int  # so far, because not finite (train)
    num_skipped_tensors: int  # so far, left out of updates inside backward (train, per_layer_update)
    low_rank_norm: (
        Diverging  # Frobenius norm of all (alpha / rank) B A together (train; and `GROUP_norm` of other groups
    )
    sparse_norm: Diverging  # of parts); of all S together

    planned_memory_bytes: int  # of tensors, at their peak, on one rank (train, final)
    peak_tensor_bytes: int  # measured, from the third update of a process on (train, final)
    peak_memory_bytes: int  # of the process on a CPU, of its tensors on CUDA; the highest rank (train, final)
    peak_memory_reserved_bytes: int  # by the allocator, on CUDA (train, final)

    perplexity: Diverging  # exp(loss) (eval, final)
    perplexity_galore_protocol: Diverging  # as published tables count it, see engine/evaluate.py (eval, final)
    bits_per_byte: Diverging  # of text (eval, final)
    eval_tokens: int  # predicted (eval, final)
    eval_processes: int  # that had a part of the text (eval, final)
    eval_exhausted: bool  # there was less text than eval_tokens asked for (eval, final)

    tasks: TaskNumbers  # by lm-eval, of eval_tasks (eval, final); a value that is not finite is null in the file

    dtype: str  # of the weights: what dtype=auto became; mixed: float32 weights, bfloat16 arithmetic (final)
    peak_memory_measure: str  # whose peak peak_memory_bytes is (final)
    num_parameters: dict[str, int]  # by group, and their total (final)
    index_bytes: int  # of the positions of S (final)
    init_from: str  # where the first weights came from (final, of a run that did not draw them)

    path: str  # of the checkpoint (checkpoint)
    blocked_seconds: float  # for which training waited for the save (checkpoint)
    save_seconds: float  # until it was on the disk; more than the former with checkpoint_async (checkpoint)
    outcome: str  # why, in words: see engine/loop.py (stopped)


_TYPES = get_type_hints(Event, include_extras=True)
DIVERGING = tuple(key for key, kind in _TYPES.items() if kind == Diverging)
NUMBERS = tuple(key for key, kind in _TYPES.items() if kind in (int, float))  # finite, or null


def published_perplexity(event: Event) -> float | None:
    """perplexity_galore_protocol of an evaluation, where it says something: from 0.9 of the true perplexity on. On few
    batches it is far lower (170 beside 29,048 on one) and None here; metrics.jsonl has it always."""
    published, true = event.get("perplexity_galore_protocol"), event.get("perplexity")
    return published if published is not None and true is not None and published >= 0.9 * true else None
