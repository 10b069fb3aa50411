"""Which numbers of several runs compare, and what a reader must know about that.

Perplexities compare only between runs that predict the same tokens: the same tokenizer, padding, row length, number of
evaluated tokens and validation text. `arrange` finds the groups of such runs. Within one group the lowest perplexity
comes first. With several groups each row carries the letter of its group, and rows are ordered by bits per byte, which
do not depend on the tokenizer.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from sltrain.reporting.rows import Row

MAX_EXPLAINED = 4  # groups; more would bury the sentence about them

# What makes perplexities comparable: the field of a row, and its name in a sentence.
PROTOCOL = {
    "tokenizer_hash": "the tokenizer",
    "padding": "padding",
    "seq_len": "seq_len",
    "eval_tokens": "the number of evaluated tokens",
    "eval_bytes": "the validation text",
}

# Settings with a column or a sentence of their own, or without influence on what is computed.
NAMED = (
    "rank sparsity alpha lr support optimizer.name dtype seed max_steps max_tokens extend method.name model.name"
    " padding seq_len experiment init_from"
).split()
MAX_NAMED = 6  # settings in a sentence
MAX_SWEPT, MAX_VALUE = 4, 16  # settings that become columns, and the longest value of one, in characters

# Keys that a row has as fields.
FIELDS = {"model": "size"} | {key: key for key in "method optimizer rank sparsity alpha lr support dtype seed".split()}


def arrange(rows: list[Row]) -> list[Row]:
    """The rows with the best first and those without a number last, and with their groups' letters if there are
    several."""
    several = len({_protocol(row) for row in rows if row.is_evaluated}) > 1
    rows = sorted(rows, key=lambda row: _rank(row.bits_per_byte if several else row.perplexity))
    letters: dict[tuple[Any, ...], str] = {}
    for row in rows:
        if several and row.is_evaluated:
            row.group = letters.setdefault(_protocol(row), _letter(len(letters)))
    return rows


def comparison(rows: list[Row]) -> str:
    """The sentence on which perplexities of arranged rows compare, and why not all; empty if all do."""
    first_of = {row.group: row for row in reversed(rows) if row.group}
    letters = sorted(first_of, key=lambda letter: (len(letter), letter))
    if not letters:
        return ""
    differing = [key for key in PROTOCOL if len({getattr(row, key) for row in first_of.values()}) > 1]
    listed = ", ".join([PROTOCOL[key] for key in differing] or ["a tokenizer that is unknown"])
    each = "; ".join(f"{letter}: {', '.join(_values(first_of[letter], differing))}" for letter in letters)
    order = "bits per byte, which do not depend on the tokenizer"
    if "eval_bytes" in differing:
        order += " (but do on the text)"
    return (
        f"Perplexities compare only between runs with the same letter. What differs: {listed}"
        f"{f' ({each})' if differing and len(letters) <= MAX_EXPLAINED else ''}. The rows are in the order of {order}."
    )


def batches(rows: list[Row]) -> str:
    """A warning if the published convention does not compare although perplexities do; else empty."""
    names = {"micro_batch_size": "micro_batch_size", "eval_processes": "the number of processes"}
    found: dict[tuple[str, str], set[int]] = {}  # unknown values do not count as different
    for row, key in itertools.product(rows, names):
        if row.is_evaluated and getattr(row, key) is not None:
            found.setdefault((key, row.group), set()).add(getattr(row, key))
    several = {key for (key, _), values in found.items() if len(values) > 1}
    if not several:
        return ""
    listed = " and ".join(name for key, name in names.items() if key in several)
    what = f"{listed} {'differs' if len(several) == 1 else 'differ'}"
    return f"The published convention depends on the batches, and {what} here: it does not compare."


def differing(rows: list[Row]) -> list[str]:
    """The settings without a column of their own in which runs of one model differ, dotted keys, those with most values
    first; of those that always go together the first. Where runs chose another optimizer or source of text, that this
    one has no such option is no difference."""
    models: dict[str | None, list[dict[str, str]]] = {}
    for row in rows:
        if row.settings:  # otherwise unknown
            models.setdefault(row.size, []).append(row.settings)
    known = {*NAMED, *(f"method.{key}" for row in rows for key in row.options)}
    counts = {
        key: max(counts)
        for key in {key for row in rows for key in row.settings} - known
        if max(counts := [_num_different(key, several) for several in models.values()]) > 1
    }
    keys: dict[tuple[str | None, ...], str] = {}
    for key in sorted(counts, key=lambda key: (-counts[key], key)):
        keys.setdefault(tuple(row.settings.get(key) for row in rows), key)
    return list(keys.values())


def _num_different(key: str, several: list[dict[str, str]]) -> int:
    chosen = f"{key.partition('.')[0]}.name"
    values = {settings.get(key) for settings in several}
    return len(values - {None} if len({settings.get(chosen) for settings in several}) > 1 else values)


def swept(rows: list[Row]) -> list[str]:
    """Those of `differing` that become columns: the first few with short values."""
    short = [key for key in differing(rows) if all(len(row.settings.get(key, "")) <= MAX_VALUE for row in rows)]
    return short[:MAX_SWEPT]


def other_differences(rows: list[Row]) -> str:
    """The sentence on settings without a column in which runs of one model differ; empty if there are none."""
    keys = sorted(set(differing(rows)) - set(swept(rows)))
    if not keys:
        return ""
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return f"Runs of one model also differ in {', '.join(keys[:MAX_NAMED])}{more}."


def best_of(rows: list[Row], keys: list[str]) -> tuple[list[Row], str]:
    """Of arranged rows the best for each value of `keys`, arranged anew, and the sentence on it. Finished runs come
    before others: the loss of a run falls until its end. Raises ValueError for a key that no run has."""
    for key in keys:
        if all(_value_of(row, key) is None for row in rows):
            some = ", ".join([*FIELDS, *differing(rows)])
            raise ValueError(f"best of {key}: no run has this key; name one or more of these, by commas: {some}")
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: not (row.is_complete and row.is_evaluated)):
        values = [_value_of(row, key) for key in keys]
        best.setdefault(", ".join("-" if value is None else f"{value}" for value in values), row)
    number = "bits per byte" if any(row.group for row in rows) else "perplexity"
    for label, row in best.items():
        row.best_of, row.group = label, ""
    sentence = f"Of {len(rows)} runs these are the best for each {' and '.join(keys)}, by {number}."
    return arrange(list(best.values())), sentence


def _value_of(row: Row, key: str) -> Any:
    """What a run was typed with: `method`, `lr`, `lr_scale.factor`, `method.merge_every`."""
    if key in FIELDS:
        return getattr(row, FIELDS[key])
    return row.settings.get(key, row.options.get(key.removeprefix("method.")))


def _protocol(row: Row) -> tuple[Any, ...]:
    """Equal for rows whose perplexities compare. An unknown tokenizer equals no other."""
    key = tuple(getattr(row, name) for name in PROTOCOL)
    return key if row.tokenizer_hash is not None else (*key, row.name)


def _values(row: Row, keys: list[str]) -> Iterator[str]:
    for key in keys:
        value = getattr(row, key)
        if key == "tokenizer_hash":
            yield f"tokenizer {value[:8]}" if value else "tokenizer unknown"
        else:
            known = "unknown" if value is None else value
            yield f"{key} {f'{known:,}' if isinstance(known, int) else known}"


def _rank(value: float | None) -> tuple[int, float]:
    if value is None:
        return 2, 0.0
    return (1, 0.0) if math.isnan(value) else (0, value)


def _letter(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    before, letter = divmod(index, 26)
    return (_letter(before - 1) if before else "") + "abcdefghijklmnopqrstuvwxyz"[letter]
