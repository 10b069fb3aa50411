"""A run as one `Row`, the numbers of the table, and one `Curve`, the losses that figures draw."""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from sltrain.events import Event, published_perplexity

# config.yaml has a method's options beside its name; early versions had them at the root, for every method.
EARLY_OPTIONS = {"sltrain": ("rank", "sparsity", "alpha", "support"), "low_rank": ("rank", "alpha")}


@dataclass
class Row:
    """One run. Each field is a column of table.csv; None if the folder does not say, NaN if a loss was not finite."""

    name: str  # the folder, relative to the path that was given
    status: str
    method: str | None = None
    size: str | None = None  # the model's name
    rank: int | None = None
    sparsity: float | None = None
    alpha: float | None = None
    lr: float | None = None
    support: str | None = None
    optimizer: str | None = None
    dtype: str | None = None
    seed: int | None = None
    init_from: str | None = None  # where its first weights came from; None: drawn
    num_parameters: int | None = None  # at the end; of an unfinished run, after its newest update
    best_of: str = ""  # the values of --best that it is the best run for
    group: str = ""  # a letter, unless perplexities of all rows compare
    perplexity: float | None = None
    perplexity_galore_protocol: float | None = None
    bits_per_byte: float | None = None
    loss: float | None = None  # of the validation text, nats a token
    evaluated_step: int | None = None  # of the four above; below `step` in an unfinished run
    peak_memory_bytes: int | None = None  # the highest of the whole run, actions between updates included
    peak_memory_measure: str | None = None  # of what: "process" on a CPU, "tensors" on CUDA
    peak_tensor_bytes: int | None = None  # of one update; on a CPU the highest over the phases of the run
    tokens_per_second: float | None = None  # median of the train lines without the first
    mfu: float | None = None  # share of the device's peak, median as above; None: not known
    tokens: int | None = None  # trained on
    step: int | None = None  # updates done
    max_steps: int | None = None
    wall_seconds: float | None = None
    tokenizer_hash: str | None = None
    padding: str | None = None
    seq_len: int | None = None
    eval_tokens: int | None = None
    eval_bytes: int | None = None  # of the evaluated text; identifies it
    micro_batch_size: int | None = None
    eval_processes: int | None = None  # that shared the evaluation
    options: dict[str, Any] = field(default_factory=dict)  # of the method, besides rank, sparsity, alpha and support
    tasks: dict[str, float] = field(default_factory=dict)  # of eval_tasks: "piqa acc" -> value, without errors
    recipe: str = ""  # equal for runs that differ only in rank, sparsity and the machine
    settings: dict[str, str] = field(default_factory=dict)  # dotted key -> value, what decides the numbers

    @property
    def is_evaluated(self) -> bool:
        """Whether there is a finite perplexity."""
        return self.perplexity is not None and math.isfinite(self.perplexity)

    @property
    def is_complete(self) -> bool:
        """Whether the numbers are those of the whole budget."""
        return self.status == "finished"


@dataclass(frozen=True)
class Point:
    """A loss and the time of its measurement."""

    tokens: float
    wall_seconds: float | None
    loss: float


@dataclass
class Curve:
    """The losses of one run over its training."""

    train: list[Point] = field(default_factory=list)
    evals: list[Point] = field(default_factory=list)


# ---- from the lines of a run


def make_row(
    name: str,
    status: str,
    config: Mapping[str, Any],
    train: Sequence[Event],
    newest_eval: Event | None,
    final: Event | None,
    last: Event | None,
    tokenizer_hash: str | None,
    num_parameters: int | None,
    settings: Mapping[str, str],
) -> Row:
    """The row of a run.

    Args:
        newest_eval: gives the losses if there is no `final`.
        last: the newest event of any kind.
        settings: the part of the configuration that decides the numbers, dotted key -> value.
    """
    return Row(
        name=printable(name),
        status=printable(status),
        num_parameters=num_parameters,
        tokenizer_hash=tokenizer_hash,
        recipe=_recipe(settings, config.get("path")),
        settings={printable(key): value for key, value in settings.items()},
        **_settings(config) | _results(train, newest_eval, final, last),
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the configuration decides. An option that the method does not have is None."""
    method = _text(config, "method", "name")
    own = config.get("method")
    options = {key: value for key, value in own.items() if key != "name"} if isinstance(own, Mapping) else {}
    options = options or {key: config.get(key) for key in EARLY_OPTIONS.get(method or "", ())}
    return {
        "method": method,
        "size": _text(config, "model", "name"),
        "optimizer": _text(config, "optimizer", "name"),
        "support": _text(options, "support"),
        "padding": _text(config, "padding"),
        "init_from": _text(config, "init_from"),
        "dtype": None if _text(config, "dtype") == "auto" else _text(config, "dtype"),  # the log has the choice
        **{key: _number(options, key) for key in ("rank", "sparsity", "alpha")},
        **{key: _number(config, key) for key in ("lr", "seed", "seq_len", "micro_batch_size")},
        "options": {
            printable(key): printable(value) if isinstance(value, str) else value
            for key, value in options.items()
            if key not in EARLY_OPTIONS["sltrain"] and isinstance(value, bool | int | float | str)
        },
        "max_steps": _max_steps(config),
    }


def _results(
    train: Sequence[Event], newest_eval: Event | None, final: Event | None, last: Event | None
) -> dict[str, Any]:
    """The fields that the log decides."""
    result, end = final or newest_eval or {}, final or last or {}
    measured = [*train, *([final] if final else [])]
    names = ("perplexity", "bits_per_byte", "loss", "eval_tokens", "eval_processes")
    return {
        **{key: result.get(key) for key in names},
        "perplexity_galore_protocol": published_perplexity(result),
        "evaluated_step": result.get("step"),
        "eval_bytes": eval_bytes(result),
        "tasks": _tasks(result),
        "peak_memory_bytes": _highest(measured, "peak_memory_bytes"),
        "peak_memory_measure": _measure(measured[-1]) if measured else None,
        "peak_tensor_bytes": _highest(measured, "peak_tensor_bytes"),
        "tokens_per_second": _median(train[1:], "tokens_per_second"),
        "mfu": _median(train[1:], "mfu"),
        **{key: end.get(key) for key in ("tokens", "step", "wall_seconds")},
        **({"dtype": chosen} if (chosen := _text(end, "dtype")) else {}),
    }


def make_curve(train: Sequence[Event], evals: Sequence[Event], final: Event | None) -> Curve:
    """The losses that the figures draw."""
    return Curve(_points(train), _points([*evals, *([final] if final else [])]))


def printable(text: str) -> str:
    """`text` on one line; ? for control characters and undecodable bytes."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _points(events: Sequence[Event]) -> list[Point]:
    return [
        Point(event["tokens"], event.get("wall_seconds"), event["loss"])
        for event in events
        if event.get("tokens") is not None and event.get("loss") is not None
    ]


def _text(config: Any, *keys: str) -> str | None:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return printable(config) if isinstance(config, str) else None


def _number(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _max_steps(config: Mapping[str, Any]) -> int | None:
    """The updates of `config.num_steps`, also for a configuration that this version refuses."""
    steps, positions = _number(config, "max_steps"), _number(config, "max_tokens")
    rows, seq_len = _number(config, "global_batch_size"), _number(config, "seq_len")
    if steps is None and positions and rows and seq_len:
        steps = math.ceil(positions / (rows * seq_len))
    return steps if steps is None else steps + (_number(config, "extend") or 0)


def _highest(events: Sequence[Event], key: Literal["peak_memory_bytes", "peak_tensor_bytes"]) -> int | None:
    """The highest value: each process that worked on a run logs its own peak."""
    return max((event[key] for event in events if event.get(key) is not None), default=None)


def _median(events: Sequence[Event], key: Literal["tokens_per_second", "mfu"]) -> float | None:
    values = [event[key] for event in events if event.get(key)]
    return statistics.median(values) if values else None


def _measure(event: Event) -> str | None:
    """Whose peak the memory is: the final line names it; of the others, only those on CUDA have reserved bytes."""
    if event.get("peak_memory_bytes") is None:
        return None
    is_cuda = "cuda" in str(event.get("peak_memory_measure")) or event.get("peak_memory_reserved_bytes")
    return "tensors" if is_cuda else "process"


def eval_bytes(event: Event) -> int | None:
    """Bytes of the evaluated text, since loss * tokens nats are bits_per_byte * bytes bits."""
    loss, tokens, bits = event.get("loss"), event.get("eval_tokens"), event.get("bits_per_byte")
    if not (loss and tokens and bits) or not (math.isfinite(loss) and math.isfinite(bits)):
        return None
    return round(loss * tokens / (math.log(2) * bits))


def _tasks(event: Event) -> dict[str, float]:
    tasks = event.get("tasks")
    return {
        printable(f"{task} {metric}"): value
        for task, numbers in (tasks.items() if isinstance(tasks, Mapping) else ())
        for metric, value in (numbers.items() if isinstance(numbers, Mapping) else ())
        if "_stderr" not in metric and isinstance(value, float)
    }


def _recipe(settings: Mapping[str, str], path: Any) -> str:
    rest = sorted((key, value) for key, value in settings.items() if key not in ("rank", "sparsity", "path"))
    rest += [("path", _corpus(str(item))) for item in (path if isinstance(path, list) else [path])]
    return hashlib.sha256(repr(rest).encode(errors="replace")).hexdigest()[:12] if settings else ""


def _corpus(path: str) -> str:
    """The end of a path that names the corpus on every machine: /data/wiki/*.gz -> wiki/*.gz, /data/wiki.*.gz ->
    wiki.*.gz."""
    parts = PurePath(path).parts
    names = (i for i, part in reversed(list(enumerate(parts))) if any(map(str.isalnum, part.partition(".")[0])))
    return "/".join(parts[next(names, 0) :])
