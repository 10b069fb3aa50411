"""The page of a report: one HTML file that needs no network, no script and no second file.

What it says is in report.html.j2; figures come as PNG and go into the page as they are, in base64. Every name from a
run folder is escaped by the template engine.
"""

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sltrain.reporting.comparison import batches, comparison, other_differences
from sltrain.reporting.drawing import DPI, Picture
from sltrain.reporting.rows import Row
from sltrain.reporting.table import shared, shown

FILES = re.compile('<meta name="sltrain-report" content="([^"]*)">')  # where a page lists the files beside it


@dataclass
class Table:
    """Cells as text, and what the headings mean."""

    headings: list[str]
    rows: list[list[str]]
    legend: str
    texts: tuple[str, ...]  # headings of the columns that are no numbers


@dataclass
class Section:
    """What a report shows besides the runs, and files that are to lie beside its page, by name."""

    title: str
    pictures: list[Picture]
    tables: list[Table]
    texts: dict[str, str]


def render_page(
    rows: list[Row],
    notes: list[str],
    pictures: Sequence[Picture],
    made: str,
    command: str,
    files: Sequence[str] = (),
    more: Section | None = None,
) -> str:
    """The page as HTML: arranged `rows`, what to know about their folders, figures, when it was made, how, and which
    files lie beside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = shown(rows)
    return environment.get_template("report.html.j2").render(
        columns=columns,
        status_class=status_class,
        lines=[(row, [(column, column.cell(row)) for column in columns]) for row in rows],
        summary=_summary(rows),
        facts=[fact for fact in (shared(rows), other_differences(rows)) if fact],
        warnings=[warning for warning in (comparison(rows), batches(rows)) if warning],
        notes=notes,
        pictures=_embedded(pictures),
        more=more,
        more_pictures=_embedded(more.pictures if more else []),
        made=made,
        files=files,
        command=command,
    )


def status_class(status: str) -> str:
    """Which of the page's three colours a status has."""
    return {"finished": "good", "running": "live", "not started": "live"}.get(status, "bad")


def _embedded(pictures: Sequence[Picture]) -> list[tuple[Picture, tuple[int, int], str]]:
    return [(picture, _pixels(picture.png), base64.b64encode(picture.png).decode()) for picture in pictures]


def _pixels(png: bytes) -> tuple[int, int]:
    """Width and height on the page, so that letters are as large in every figure; from the PNG's header."""
    width, height = struct.unpack(">II", png[16:24])
    return round(width * 96 / DPI), round(height * 96 / DPI)


def _summary(rows: list[Row]) -> str:
    """2 runs: 1 finished, 1 running."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    states = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(rows)} run{'s' * (len(rows) != 1)}: {states}"
