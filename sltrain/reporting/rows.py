"""One run is one `Row`: the numbers of the table. Its `Curve` holds what the figures draw.

Perplexity compares only between runs that predict the same tokens: the same tokenizer, padding, row length, number of
evaluated tokens and validation text. `arrange` finds the groups of such runs. With one group the best perplexity comes
first. With several each row carries its group's letter and the order is that of bits per byte, which is free of
the tokenizer.
"""

import hashlib
import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

Event = Mapping[str, Any]

# Which numbers of the method a method uses; those it does not use are None.
USED = {"full": (), "low_rank": ("rank", "alpha")}
ALL_USED = ("rank", "sparsity", "alpha")

MAX_EXPLAINED = 4  # groups; more would bury the sentence about them

# What makes perplexities comparable: the field of a row, and its name in a sentence.
PROTOCOL = {
    "tokenizer_hash": "the tokenizer",
    "padding": "padding",
    "seq_len": "seq_len",
    "eval_tokens": "the number of evaluated tokens",
    "eval_bytes": "the validation text",
}


@dataclass
class Row:
    """One run. A field is a column of table.csv; None where the folder does not say, NaN where a loss was not
    finite."""

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
    num_parameters: int | None = None
    group: str = ""  # a letter, if perplexities do not compare between all rows
    perplexity: float | None = None
    perplexity_galore_protocol: float | None = None
    bits_per_byte: float | None = None
    loss: float | None = None  # of the validation text, nats a token
    evaluated_step: int | None = None  # of the four above; below `step` while a run is not finished
    peak_memory_bytes: int | None = None
    peak_memory_measure: str | None = None  # of what: "process" on a CPU, "tensors" on CUDA
    peak_tensor_bytes: int | None = None
    tokens_per_second: float | None = None  # median of the train lines without the first
    tokens: int | None = None  # trained on
    step: int | None = None  # updates done
    max_steps: int | None = None
    wall_seconds: float | None = None
    tokenizer_hash: str | None = None
    padding: str | None = None
    seq_len: int | None = None
    eval_tokens: int | None = None
    eval_bytes: int | None = None  # of the evaluated text: tells two texts apart, wherever they lie
    micro_batch_size: int | None = None
    eval_processes: int | None = None  # that shared the evaluation
    recipe: str = ""  # equal for runs that differ in rank, sparsity and the machine alone

    @property
    def is_evaluated(self) -> bool:
        """Whether there is an evaluation that compares: a number."""
        return math.isfinite(math.nan if self.perplexity is None else self.perplexity)

    @property
    def is_complete(self) -> bool:
        """Whether its numbers are those of the whole budget."""
        return self.status == "finished"


@dataclass(frozen=True)
class Point:
    """A loss and when it was measured."""

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
    not_recipe: Collection[str] = (),
) -> Row:
    """The row of a run.

    Args:
        newest_eval: where the losses come from while there is no `final`.
        last: the newest event of any kind.
        not_recipe: keys of the configuration that do not change what is computed.
    """
    return Row(
        name=printable(name),
        status=printable(status),
        num_parameters=num_parameters,
        tokenizer_hash=tokenizer_hash,
        recipe=_recipe(config, {"rank", "sparsity", *not_recipe}),
        **_settings(config) | _results(train, newest_eval, final, last),
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the configuration decides. What the method does not use is None."""
    method = _text(config, "method", "name")
    used = USED.get(method or "", ALL_USED)
    return {
        "method": method,
        "size": _text(config, "model", "name"),
        **{key: _number(config, key) for key in used},
        "lr": _number(config, "lr"),
        "support": _text(config, "support") if "sparsity" in used else None,
        "optimizer": _text(config, "optimizer", "name"),
        "dtype": _text(config, "dtype"),
        "seed": _number(config, "seed"),
        "max_steps": _max_steps(config),
        "padding": _text(config, "padding"),
        "seq_len": _number(config, "seq_len"),
        "micro_batch_size": _number(config, "micro_batch_size"),
    }


def _results(
    train: Sequence[Event], newest_eval: Event | None, final: Event | None, last: Event | None
) -> dict[str, Any]:
    """The fields that the log decides."""
    result, end = final or newest_eval or {}, final or last or {}
    measured = [*train, *([final] if final else [])]
    speeds = [event["tokens_per_second"] for event in train[1:] if event.get("tokens_per_second")]
    names = ("perplexity", "perplexity_galore_protocol", "bits_per_byte", "loss", "eval_tokens", "eval_processes")
    return {
        **{key: result.get(key) for key in names},
        "evaluated_step": result.get("step"),
        "eval_bytes": _eval_bytes(result),
        "peak_memory_bytes": _highest(measured, "peak_memory_bytes"),
        "peak_memory_measure": _measure(measured[-1]) if measured else None,
        "peak_tensor_bytes": _highest(measured, "peak_tensor_bytes"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        **{key: end.get(key) for key in ("tokens", "step", "wall_seconds")},
        **({"dtype": chosen} if (chosen := _text(end, "dtype")) else {}),  # what dtype=auto became
    }


def make_curve(train: Sequence[Event], evals: Sequence[Event], final: Event | None) -> Curve:
    """What the figures draw of a run."""
    return Curve(_points(train), _points([*evals, *([final] if final else [])]))


def printable(text: str) -> str:
    """`text` on one line, without control characters and without bytes that are no text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _points(events: Sequence[Event]) -> list[Point]:
    return [
        Point(event["tokens"], event.get("wall_seconds"), event["loss"])
        for event in events
        if event.get("tokens") is not None and event.get("loss") is not None
    ]


def _get(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _text(config: Any, *keys: str) -> str | None:
    value = _get(config, *keys)
    return printable(value) if isinstance(value, str) else None


def _number(config: Any, *keys: str) -> Any:
    value = _get(config, *keys)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _max_steps(config: Mapping[str, Any]) -> int | None:
    """As `config.num_steps` counts them, also of a configuration that this version would refuse."""
    steps, positions = _number(config, "max_steps"), _number(config, "max_tokens")
    rows, seq_len = _number(config, "global_batch_size"), _number(config, "seq_len")
    if steps is None and positions and rows and seq_len:
        steps = math.ceil(positions / (rows * seq_len))
    return steps


def _highest(events: Sequence[Event], key: str) -> int | None:
    """Of all processes that worked on the run: each knows its own peak."""
    return max((event[key] for event in events if event.get(key) is not None), default=None)


def _measure(event: Event) -> str | None:
    """Whose peak the memory is. The final line says it; of the others only those on CUDA tell what was reserved."""
    if event.get("peak_memory_bytes") is None:
        return None
    is_cuda = "cuda" in str(event.get("peak_memory_measure")) or event.get("peak_memory_reserved_bytes")
    return "tensors" if is_cuda else "process"


def _eval_bytes(event: Event) -> int | None:
    """The bytes that the evaluated tokens stand for: loss * tokens nats are bits_per_byte * bytes bits."""
    loss, tokens, bits = (event.get(key) for key in ("loss", "eval_tokens", "bits_per_byte"))
    if not (loss and tokens and bits) or not (math.isfinite(loss) and math.isfinite(bits)):
        return None
    return round(loss * tokens / (math.log(2) * bits))


def _recipe(config: Mapping[str, Any], without: Collection[str]) -> str:
    """A hash of the configuration. Of the corpus the files' names count, not the folder, which differs by machine."""
    rest = sorted((str(key), repr(value)) for key, value in config.items() if key not in {*without, "path"})
    rest.append(("path", PurePath(str(config.get("path"))).name))
    return hashlib.sha256(repr(rest).encode(errors="replace")).hexdigest()[:12] if config else ""


# ---- between runs


def arrange(rows: list[Row]) -> list[Row]:
    """The rows, best first, those without a number last, with the letters of their groups if there is more than
    one."""
    groups = {_protocol(row): "" for row in rows if row.is_evaluated}
    several = len(groups) > 1
    rows = sorted(rows, key=lambda row: _rank(row.bits_per_byte if several else row.perplexity))
    for row in rows:
        key = _protocol(row)
        if several and row.is_evaluated:
            groups[key] = groups[key] or _letter(sum(letter != "" for letter in groups.values()))
            row.group = groups[key]
    return rows


def comparison(rows: list[Row]) -> str:
    """What a reader of arranged rows must know: that perplexities do not all compare, and why. Empty if they do."""
    first_of = {row.group: row for row in reversed(rows) if row.group}
    letters = sorted(first_of, key=lambda letter: (len(letter), letter))
    if not letters:
        return ""
    differing = [key for key in PROTOCOL if len({getattr(row, key) for row in first_of.values()}) > 1]
    what = [PROTOCOL[key] for key in differing] or ["a tokenizer that is unknown"]
    listed = ", ".join(what)
    each = "; ".join(f"{letter}: {', '.join(_say(first_of[letter], differing))}" for letter in letters)
    order = "bits per byte, which do not depend on the tokenizer"
    if "eval_bytes" in differing:
        order += " (but do on the text)"
    return (
        f"Perplexities compare only between runs with the same letter. What differs: {listed}"
        f"{f' ({each})' if differing and len(letters) <= MAX_EXPLAINED else ''}. The rows are in the order of {order}."
    )


def batches(rows: list[Row]) -> str:
    """A warning where the published convention does not compare although perplexities do; else empty."""
    names = {"micro_batch_size": "micro_batch_size", "eval_processes": "the number of processes"}
    found: dict[tuple[str, str], set[int]] = {}  # what is unknown is not said to differ
    for row, key in itertools.product(rows, names):
        if row.is_evaluated and getattr(row, key) is not None:
            found.setdefault((row.group, key), set()).add(getattr(row, key))
    differing = [name for key, name in names.items() if any(k == key and len(v) > 1 for (_, k), v in found.items())]
    if not differing:
        return ""
    what = f"{' and '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}"
    return f"The published convention depends on the batches, and {what} here: it does not compare."


def _protocol(row: Row) -> tuple[Any, ...]:
    """Equal for rows whose perplexities compare. An unknown tokenizer is like no other."""
    key = tuple(getattr(row, name) for name in PROTOCOL)
    return key if row.tokenizer_hash is not None else (*key, row.name)


def _say(row: Row, keys: list[str]) -> Iterator[str]:
    for key in keys:
        value = getattr(row, key)
        if key == "tokenizer_hash":
            yield f"tokenizer {value[:8]}" if value else "tokenizer unknown"
        else:
            yield f"{key} {f'{value:,}' if isinstance(value, int) else value}"


def _rank(value: float | None) -> tuple[int, float]:
    if value is None:
        return 2, 0.0
    return (1, 0.0) if math.isnan(value) else (0, value)


def _letter(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    before, letter = divmod(index, 26)
    return (_letter(before - 1) if before else "") + "abcdefghijklmnopqrstuvwxyz"[letter]
