"""The columns of the table, each defined once, and tables as text for a terminal, Markdown and CSV.

People read rounded numbers with units, and only columns that distinguish runs. CSV has the raw fields of a row under
their names in `Row`.
"""

import csv
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sltrain.reporting.comparison import batches, comparison, differing, other_differences, swept
from sltrain.reporting.rows import Row

MAX_NAME = 44  # characters of a name on a terminal
MAX_TASKS = 6  # columns of numbers of tasks; CSV has all
WIDTH = 160  # of text that does not go to a terminal


@dataclass(frozen=True)
class Column:
    """One column of the table for people."""

    key: str  # a field of Row
    heading: str
    show: Callable[[Any], str]  # value -> text
    drop: int = 0  # a narrow terminal omits the column with the highest first; 0: never
    is_text: bool = False  # aligned left
    is_setting: bool = False  # a value that all runs share moves to a sentence
    is_detail: bool = False  # shown only where it differs
    within: str = ""  # the field that is a mapping with `key`: options of the method, settings, or tasks
    add: Callable[[Row], str] = lambda row: ""  # appended to the value

    def cell(self, row: Row) -> str:
        """The value as text; a dash for none."""
        value = getattr(row, self.within).get(self.key) if self.within else getattr(row, self.key)
        return "-" if value is None or value == "" else self.show(value) + self.add(row)


def short(number: float) -> str:
    """43.46M, 1.2B, 4,096."""
    for least, unit, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "K")):
        if number >= least:
            return f"{number / unit:.4g}{letter}"
    return f"{number:,.0f}"


whole, four_digits, plain = "{:,.0f}".format, "{:.4f}".format, "{:g}".format


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def of_tensors(num_bytes: float) -> str:
    """12.34 GB, 86.1 MB: small models differ in the latter."""
    return gigabytes(num_bytes) if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """45 s, 12.3 min, 4.5 h, 3.1 days."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2g}"  # also nan, which is not below 1e6


def task_number(value: float) -> str:
    return four_digits(value) if value < 1000 else f"{value:.5g}"  # an accuracy, or a perplexity


def at_step(row: Row) -> str:
    """@STEP of an evaluation that is not the final one."""
    return "" if row.is_complete or row.evaluated_step is None else f" @{row.evaluated_step:,}"


COLUMNS = (
    Column("name", "run", str, is_text=True),
    Column("status", "status", str, is_text=True),
    Column("method", "method", str, drop=2, is_text=True, is_setting=True),
    Column("size", "model", str, drop=9, is_text=True, is_setting=True),
    Column("rank", "rank", plain, drop=6, is_setting=True),
    Column("sparsity", "sparsity", plain, drop=6, is_setting=True),
    Column("alpha", "alpha", plain, drop=10, is_setting=True),
    Column("lr", "lr", plain, drop=8, is_setting=True),
    Column("support", "support", str, drop=6, is_text=True, is_detail=True),
    Column("optimizer", "optimizer", str, drop=6, is_text=True, is_detail=True),
    Column("dtype", "dtype", str, drop=6, is_text=True, is_detail=True),
    Column("seed", "seed", str, drop=6, is_detail=True),
    Column("init_from", "from", str, drop=6, is_text=True),
    Column("num_parameters", "parameters", short, drop=1),
    Column("group", "set", str, is_text=True),
    Column("perplexity", "perplexity", perplexity, add=at_step),
    Column("perplexity_galore_protocol", "published convention", perplexity, drop=7),
    Column("bits_per_byte", "bits/byte", four_digits, drop=2),
    Column("peak_tensor_bytes", "peak of tensors", of_tensors, drop=1),
    Column("peak_memory_bytes", "peak memory", gigabytes, drop=1),
    Column("peak_memory_measure", "peak memory of", str, drop=1, is_text=True, is_setting=True),
    Column("tokens_per_second", "tokens/s", short, drop=3),
    Column("mfu", "MFU", "{:.1%}".format, drop=3),
    Column("step", "step", whole, drop=4, add=lambda row: "" if row.max_steps is None else f"/{whole(row.max_steps)}"),
    Column("wall_seconds", "time", duration, drop=11),
    Column("tokens", "tokens", short, drop=12),
    Column("loss", "loss", four_digits, drop=14),
)


def columns_of(rows: list[Row]) -> list[Column]:
    """COLUMNS, after `support` a column for each further option of a method and for the settings that were swept, and
    after the bits per byte one for each of the first MAX_TASKS numbers of tasks."""
    options = dict.fromkeys(key for row in rows for key in row.options)
    place = 1 + next(i for i, column in enumerate(COLUMNS) if column.key == "support")
    more = [
        Column(key, key.replace("_", " "), str, drop=6, is_text=True, is_detail=True, within="options")
        for key in options
    ]
    more += [Column(key, key, str, drop=2, is_text=True, within="settings") for key in swept(rows)]
    tasks = list(dict.fromkeys(key for row in rows for key in row.tasks))[:MAX_TASKS]
    numbers = [Column(key, key, task_number, drop=2, within="tasks", add=at_step) for key in tasks]
    after = 1 + next(i for i, column in enumerate(COLUMNS) if column.key == "bits_per_byte")
    return [*COLUMNS[:place], *more, *COLUMNS[place:after], *numbers, *COLUMNS[after:]]


def shown(rows: list[Row]) -> list[Column]:
    """The columns in which some row has a value, without those that the sentence of `shared` covers."""
    columns = [column for column in columns_of(rows) if not _is_shared(column, rows)]
    return [column for column in columns if _num_values(column, rows) >= (2 if column.is_detail else 1)]


def shared(rows: list[Row]) -> str:
    """The sentence on settings that all of several runs share; empty if there are none."""
    same = [f"{column.heading} {column.cell(rows[0])}" for column in COLUMNS if _is_shared(column, rows)]
    return f"In all runs: {', '.join(same)}." if same else ""


def sentences(rows: list[Row]) -> list[str]:
    """What a reader of the table must know: shared settings, and which numbers compare."""
    return [text for text in (shared(rows), other_differences(rows), comparison(rows), batches(rows)) if text]


def _num_values(column: Column, rows: list[Row]) -> int:
    """How many different values the column has."""
    return len({column.cell(row) for row in rows} - {"-"})


def _is_shared(column: Column, rows: list[Row]) -> bool:
    cells = {column.cell(row) for row in rows}
    return column.is_setting and len(rows) > 1 and len(cells) == 1 and cells != {"-"}


# ---- text


@dataclass
class Table:
    """Headings and cells as text; columns named in `texts` are aligned left, the others right."""

    headings: list[str]
    rows: list[list[str]]
    texts: Sequence[str]
    legend: str = ""  # what the headings mean


def run_table(rows: list[Row], columns: list[Column], max_name: int | None = None) -> Table:
    """The cells of these columns. Names longer than `max_name` are shortened in the middle."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    if max_name:
        cells = [[elide(name, max_name), *rest] for name, *rest in cells]
    return Table([column.heading for column in columns], cells, [c.heading for c in columns if c.is_text])


def aligned(table: Table) -> str:
    """The table as lines of plain text."""
    lines = [table.headings, *table.rows]
    sides = ["<" if heading in table.texts else ">" for heading in table.headings]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map("{:{}{}}".format, line, sides, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def text_table(rows: list[Row], width: int | None = None) -> str:
    """The table and its sentences for a terminal of `width` columns (default: that of stdout)."""
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else WIDTH
    columns = shown(rows)
    text = aligned(run_table(rows, columns, MAX_NAME))
    while max(map(len, text.splitlines())) > width and any(column.drop for column in columns):
        columns.remove(max(reversed(columns), key=lambda column: column.drop))
        text = aligned(run_table(rows, columns, MAX_NAME))
    return "\n".join([text, *(line for sentence in sentences(rows) for line in textwrap.wrap(sentence, width))])


def elide(text: str, length: int) -> str:
    """`text`, its middle replaced by dots if it is longer than `length`: names of runs differ at their ends."""
    if len(text) <= length:
        return text
    end = (length - 3) // 2
    return f"{text[: length - 3 - end]}...{text[-end:]}"


# ---- Markdown and CSV


def markdown(table: Table) -> str:
    """The lines of a Markdown table."""
    rule = ["---" if heading in table.texts else "---:" for heading in table.headings]
    lines = [table.headings, rule, *([_escape(cell) for cell in cells] for cells in table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown_table(rows: list[Row]) -> str:
    """The table and its sentences in Markdown."""
    table = run_table(rows, shown(rows))
    return "\n\n".join([markdown(table), *map(_escape, sentences(rows))]) + "\n"


def _escape(text: str) -> str:
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Lines of CSV; empty for None."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def csv_table(rows: list[Row]) -> str:
    """Every field of every row, raw; of its settings those in which the runs differ, by their dotted keys."""
    mappings = {"options": "method.", "tasks": "tasks.", "settings": ""}
    names = [item.name for item in fields(Row) if item.name not in mappings]
    keys = {field: dict.fromkeys(key for r in rows for key in getattr(r, field)) for field in ("options", "tasks")}
    keys["settings"] = dict.fromkeys(key for key in differing(rows) if key not in names)
    head = [*names, *(f"{mappings[field]}{key}" for field in keys for key in keys[field])]
    lines = [
        [*(getattr(r, n) for n in names), *(getattr(r, field).get(key) for field in keys for key in keys[field])]
        for r in rows
    ]
    return csv_text([head, *lines])
