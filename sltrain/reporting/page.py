"""The page of a report: one HTML file without network, scripts or further files.

report.html.j2 holds its text; figures are embedded as base64 PNG. The template engine escapes every name from a run
folder.
"""

import base64
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sltrain.reporting.comparison import batches, comparison, other_differences
from sltrain.reporting.drawing import DPI, Picture
from sltrain.reporting.rows import Row
from sltrain.reporting.table import Table, run_table, shared, shown

FILES = re.compile('<meta name="sltrain-report" content="([^"]*)">')  # the files beside a page


@dataclass
class Section:
    """An extra part of a report, and the text files it adds beside the page, by name."""

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
    """The page as HTML.

    Args:
        rows: arranged.
        notes: on damage in their folders.
        made: date and time.
        command: that made the page.
        files: written beside the page.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        runs=run_table(rows, shown(rows)),
        status_class=status_class,
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
    """The CSS class that colours a status."""
    return {"finished": "good", "running": "live", "not started": "live"}.get(status, "bad")


def _embedded(pictures: Sequence[Picture]) -> list[tuple[Picture, tuple[int, int], str]]:
    return [(picture, _pixels(picture.png), base64.b64encode(picture.png).decode()) for picture in pictures]


def _pixels(png: bytes) -> tuple[int, int]:
    """Width and height on the page, from the PNG's header; text has the same size in every figure."""
    width, height = struct.unpack(">II", png[16:24])
    return round(width * 96 / DPI), round(height * 96 / DPI)


def _summary(rows: list[Row]) -> str:
    """2 runs: 1 finished, 1 running."""
    states = ", ".join(f"{count} {status}" for status, count in Counter(row.status for row in rows).most_common())
    return f"{len(rows)} run{'s' * (len(rows) != 1)}: {states}"
