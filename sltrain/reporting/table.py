"""The columns of the table, each once, and the table as text for a terminal, Markdown and CSV.

People read rounded numbers with units and see only columns that say something. CSV has the fields of a row, raw, under
their names in `Row`.
"""

import csv
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from sltrain.reporting.comparison import batches, comparison, other_differences
from sltrain.reporting.rows import Row

MAX_NAME = 44  # characters of a name on a terminal
WIDTH = 160  # of text that goes to no terminal


@dataclass(frozen=True)
class Column:
    """One column for people: the field it shows, its heading, how a value is written, and the order in which a narrow
    terminal does without: the highest first. `is_text` is aligned left. A setting that all runs share is said once,
    in a sentence, instead."""

    key: str
    heading: str
    show: Callable[[Any], str]
    drop: int = 0
    is_text: bool = False
    is_setting: bool = False
    is_detail: bool = False  # shown only where it differs
    is_option: bool = False  # `key` is an option of the method, not a field
    add: Callable[[Row], str] = lambda row: ""  # what else a cell says, after the value

    def cell(self, row: Row) -> str:
        """The value for people; a dash for none."""
        value = row.options.get(self.key) if self.is_option else getattr(row, self.key)
        return "-" if value is None or value == "" else self.show(value) + self.add(row)


def short(number: float) -> str:
    """43.46M, 1.2B, 4,096."""
    for least, unit, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "K")):
        if number >= least:
            return f"{number / unit:.4g}{letter}"
    return f"{number:,.0f}"


def whole(number: float) -> str:
    return f"{number:,.0f}"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """45 s, 12.3 min, 4.5 h, 3.1 days."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2g}"  # also nan, which is below nothing


def four_digits(value: float) -> str:
    return f"{value:.4f}"


def plain(value: float) -> str:
    return f"{value:g}"


def at_step(row: Row) -> str:
    """Of a number that is not the final one: when it was measured."""
    return "" if row.is_complete or row.evaluated_step is None else f" @{row.evaluated_step:,}"


COLUMNS = (
    Column("name", "run", str, is_text=True),
    Column("status", "status", str, is_text=True),
    Column("method", "method", str, drop=5, is_text=True, is_setting=True),
    Column("size", "model", str, drop=9, is_text=True, is_setting=True),
    Column("rank", "rank", plain, drop=6, is_setting=True),
    Column("sparsity", "sparsity", plain, drop=6, is_setting=True),
    Column("alpha", "alpha", plain, drop=10, is_setting=True),
    Column("lr", "lr", plain, drop=8, is_setting=True),
    Column("support", "support", str, drop=6, is_text=True, is_detail=True),
    Column("optimizer", "optimizer", str, drop=6, is_text=True, is_detail=True),
    Column("dtype", "dtype", str, drop=6, is_text=True, is_detail=True),
    Column("seed", "seed", str, drop=6, is_detail=True),
    Column("num_parameters", "parameters", short, drop=1),
    Column("group", "set", str, is_text=True),
    Column("perplexity", "perplexity", perplexity, add=at_step),
    Column("perplexity_galore_protocol", "published convention", perplexity, drop=7),
    Column("bits_per_byte", "bits/byte", four_digits, drop=2),
    Column("peak_memory_bytes", "peak memory", gigabytes, drop=1),
    Column("peak_memory_measure", "peak memory of", str, drop=1, is_text=True, is_setting=True),
    Column("tokens_per_second", "tokens/s", short, drop=3),
    Column("step", "step", whole, drop=4, add=lambda row: "" if row.max_steps is None else f"/{whole(row.max_steps)}"),
    Column("wall_seconds", "time", duration, drop=11),
    Column("tokens", "tokens", short, drop=12),
    Column("loss", "loss", four_digits, drop=14),
    Column("peak_tensor_bytes", "peak of tensors", gigabytes, drop=13),
)


def columns_of(rows: list[Row]) -> list[Column]:
    """COLUMNS and, after the method's usual options, a column for each other option of a method."""
    options = dict.fromkeys(key for row in rows for key in row.options)
    place = 1 + next(i for i, column in enumerate(COLUMNS) if column.key == "support")
    more = [
        Column(key, key.replace("_", " "), str, drop=6, is_text=True, is_detail=True, is_option=True) for key in options
    ]
    return [*COLUMNS[:place], *more, *COLUMNS[place:]]


def shown(rows: list[Row]) -> list[Column]:
    """The columns in which some row has a value, without those that `shared` says."""
    least = {False: 1, True: 2}  # different values
    return [c for c in columns_of(rows) if not _is_shared(c, rows) and _num_values(c, rows) >= least[c.is_detail]]


def shared(rows: list[Row]) -> str:
    """The settings that all of several runs have, as a sentence; empty if there are none."""
    same = [f"{column.heading} {column.cell(rows[0])}" for column in COLUMNS if _is_shared(column, rows)]
    return f"In all runs: {', '.join(same)}." if same else ""


def sentences(rows: list[Row]) -> list[str]:
    """What a reader of the table must know: shared settings, and what compares."""
    return [
        sentence for sentence in (shared(rows), other_differences(rows), comparison(rows), batches(rows)) if sentence
    ]


def _num_values(column: Column, rows: list[Row]) -> int:
    """How many different values there are."""
    return len({column.cell(row) for row in rows} - {"-"})


def _is_shared(column: Column, rows: list[Row]) -> bool:
    cells = {column.cell(row) for row in rows}
    return column.is_setting and len(rows) > 1 and len(cells) == 1 and cells != {"-"}


# ---- text


def text_table(rows: list[Row], width: int | None = None) -> str:
    """Aligned lines for a terminal of `width` columns (default: the one that this process prints to), and the
    sentences that belong to it."""
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else WIDTH
    columns = shown(rows)
    while sum(_width(column, rows) + 2 for column in columns) - 2 > width and any(column.drop for column in columns):
        columns.remove(max(reversed(columns), key=lambda column: column.drop))
    lines = []
    for cells in ([column.heading for column in columns], *([_text_cell(c, row) for c in columns] for row in rows)):
        padded = [
            cell.ljust(_width(column, rows)) if column.is_text else cell.rjust(_width(column, rows))
            for cell, column in zip(cells, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *(line for sentence in sentences(rows) for line in textwrap.wrap(sentence, width))])


def _text_cell(column: Column, row: Row) -> str:
    return elide(row.name, MAX_NAME) if column.key == "name" else column.cell(row)


def _width(column: Column, rows: list[Row]) -> int:
    return max(len(column.heading), *(len(_text_cell(column, row)) for row in rows))


def elide(text: str, length: int) -> str:
    """`text` without its middle, if it is longer than `length`: names of runs differ at their ends."""
    if len(text) <= length:
        return text
    end = (length - 3) // 2
    return f"{text[: length - 3 - end]}...{text[-end:]}"


# ---- Markdown and CSV


def markdown_table(rows: list[Row]) -> str:
    """The table in Markdown, and the sentences that belong to it."""
    columns = shown(rows)
    lines = [
        [column.heading for column in columns],
        ["---" if column.is_text else "---:" for column in columns],
        *([_escape(column.cell(row)) for column in columns] for row in rows),
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *(_escape(sentence) for sentence in sentences(rows))]) + "\n"


def _escape(text: str) -> str:
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


def csv_table(rows: list[Row]) -> str:
    """Every field of every row but its settings, raw; empty for None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [item.name for item in fields(Row) if item.name not in ("settings", "options")]
    options = list(dict.fromkeys(key for row in rows for key in row.options))
    writer.writerow([*names, *(f"method.{key}" for key in options)])
    for row in rows:
        writer.writerow([*(getattr(row, name) for name in names), *(row.options.get(key) for key in options)])
    return out.getvalue()
