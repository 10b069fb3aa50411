"""Rows of a benchmark as a table for people."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column: the rows' key, the title, and how a value is written; None is written as a dash."""

    key: str
    title: str
    write: Callable[[Any], str] = str


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def two_digits(number: float) -> str:
    return f"{number:.2f}"


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def format_table(rows: list[dict[str, Any]], columns: list[Column]) -> str:
    """Lines of a Markdown table, so that it can be pasted as it is; columns in which no row has a value are left
    out."""
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    cells = [[column.title for column in columns]]
    for row in rows:
        values = [row.get(column.key) for column in columns]
        cells.append(
            ["-" if value is None else column.write(value) for value, column in zip(values, columns, strict=True)]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    is_text = [all(isinstance(row.get(column.key), str | None) for row in rows) for column in columns]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)
