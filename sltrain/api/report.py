"""Run folders -> the rows of a table, its figures and a page.

    rows, notes = read_rows([Path("outputs")])
    print(text_table(rows))                                   # sltrain.reporting.table

    report = read_report([Path("outputs")], best="method")    # of each method its best run; without it all
    write_report(report, Path("outputs/report"), command)     # report.html, table.md, table.csv, *.png

Only a run that is not finished needs torch: its parameters are counted on a model without memory.
"""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sltrain.config import CHANGEABLE_ON_RESUME
from sltrain.engine.metrics import to_strict_json
from sltrain.log import first_line
from sltrain.reporting.comparison import arrange, best_of
from sltrain.reporting.page import FILES, Section, render_page
from sltrain.reporting.rows import Curve, Row, make_curve, make_row, printable
from sltrain.reporting.table import csv_table, markdown_table
from sltrain.runs.run_folder import flatten, write_atomically
from sltrain.runs.run_record import RunRecord, find_runs, is_run, read_run

PAGE = "report.html"
OURS = re.compile(
    r"report\.html|(table|spectrum)\.md|(table|spectrum|energy)\.csv"
    r"|(loss_tokens|loss_time|memory|heat_map_\d+|spectrum_\d+(_\d+)?|energy)\.png"
)  # every name that a report may use


@dataclass
class Report:
    """What was found below some paths: rows in the order of the table, the curve of each by its name, and what to
    know about the folders."""

    rows: list[Row]
    curves: dict[str, Curve]
    notes: list[str]
    first: Path | None  # of the paths, the first with a run


def read_rows(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The rows of every run at or below `paths`, in the order of the table, and what to know about them."""
    report = read_report(paths)
    return report.rows, report.notes


def read_report(paths: Sequence[Path], best: str | None = None) -> Report:
    """Read every run at or below `paths`. A path that is not there or holds no run becomes a note. With `best`, a key
    or several by commas, only the best run for each of their values is kept; raises ValueError if no run has one."""
    roots: dict[str, tuple[Path, Path]] = {}  # real path of a run -> path it was found by, and its folder
    notes = []
    studies: list[Path] = []
    for path in paths:
        known = len(studies)
        found = find_runs([path], studies)
        if not found and len(studies) == known:
            notes.append(nothing_at(path))
        for folder in found:
            roots.setdefault(os.path.realpath(folder), (path, folder))
    rows, curves = [], {}
    for name, (_, folder) in zip(_names(list(roots.values())), roots.values(), strict=True):
        record = read_run(folder)
        row = _row(name, record)
        rows.append(row)
        curves[row.name] = make_curve(record.train, record.evals, record.final)
        notes += [f"{row.name}: {note}" for note in record.notes]
    if studies:
        names = ", ".join(map(str, studies))
        notes.append(f"Runs of studies are left out ({names}): a study has a page, sltrain-report --study FOLDER")
    first = next((root for root, _ in roots.values()), None)
    rows = arrange(rows)
    if best is not None and rows:
        rows, sentence = best_of(rows, [key.strip() for key in best.split(",")])
        notes.append(sentence)
    return Report(rows, curves, [printable(note) for note in notes], first)


def nothing_at(path: Path) -> str:
    """Why no run is found there, and what to name."""
    if not path.exists():
        return f"{path} does not exist"
    if not path.is_dir():
        return f"{path} is a file; name the folder of a run, or one with run folders below it"
    return f"{path} holds no run; name the folder of a run, or one with run folders below it"


def _names(found: list[tuple[Path, Path]]) -> list[str]:
    """A name for each run: its folder relative to its root; if that does not tell all apart, with the root's name; if
    that does not either, the whole path."""
    short = [str(run.relative_to(root)) if run != root else Path(os.path.realpath(run)).name for root, run in found]
    longer = [str(Path(os.path.realpath(root)).name / run.relative_to(root)) for root, run in found]
    whole = [os.path.realpath(run) for _, run in found]
    return next((names for names in (short, longer) if len({printable(name) for name in names}) == len(names)), whole)


def _row(name: str, record: RunRecord) -> Row:
    """The row of a run. Adds to the record's notes if its parameters cannot be counted."""
    counted = (record.final or {}).get("num_parameters")
    num_parameters = counted.get("total") if isinstance(counted, dict) else None
    if not isinstance(num_parameters, int):
        num_parameters = None
        try:
            num_parameters = count_parameters_of(record.path, (record.last or {}).get("step", 0))
        except (OSError, ValueError) as error:
            record.notes.append(f"its parameters cannot be counted: {first_line(error)}")
    return make_row(
        name,
        record.status,
        record.config,
        record.train,
        record.evals[-1] if record.evals else None,
        record.final,
        record.last,
        record.tokenizer_hash,
        num_parameters,
        _computed(record.config),
    )


def _computed(config: dict[str, Any]) -> dict[str, str]:
    """The settings that decide what is computed, by dotted key; the corpus is one of them. Options that repeat the
    value of a key of the run are left out, and so are empty ones: earlier versions wrote others."""
    names = [key for key in config if key == "path" or key not in CHANGEABLE_ON_RESUME]
    settings, root = flatten({name: config[name] for name in names}), flatten(config)

    def repeats(key: str, value: Any) -> bool:
        own = key.partition(".")[2]
        return root.get(own, config.get(own)) == value

    return {key: str(value) for key, value in settings.items() if "." not in key or (value and not repeats(key, value))}


def count_parameters_of(run: Path, step: int = 0) -> int:
    """How many values the run in this folder trains after update `step`, counted on its model, built without memory.
    Raises OSError or ValueError if its configuration cannot be read or is of another version."""
    from sltrain.compose import read_config  # seconds, with torch; a finished run has its number in its last line

    config = read_config(run / "config.yaml")
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        from tokenizers import Tokenizer

        text = (run / "tokenizer.json").read_bytes().decode()
        try:
            vocab_size = Tokenizer.from_str(text).get_vocab_size()
        except Exception as error:  # it has no type of its own
            raise ValueError("tokenizer.json is damaged") from error
    import torch

    from sltrain.building.model import build_model
    from sltrain.building.phases import change_until
    from sltrain.planning.accounting import count_parameters

    model = build_model(config, vocab_size, torch.float32)
    change_until(config, model, step)
    return count_parameters(model)["total"]


def write_report(report: Report, output: Path, command: str = "", more: Section | None = None) -> Path:
    """Write page, table and figures into the folder `output`, with what `more` brings, in place of an earlier report's,
    and return the page's path. Raises ValueError if nothing can be written there."""
    from sltrain.reporting.figures import draw_all  # with matplotlib

    pictures = draw_all(report.rows, report.curves)
    files: dict[str, str | bytes] = {"table.md": markdown_table(report.rows), "table.csv": csv_table(report.rows)}
    files |= {picture.file_name: picture.png for picture in [*pictures, *(more.pictures if more else [])]}
    files |= more.texts if more else {}
    made = time.strftime("%Y-%m-%d %H:%M %Z").strip()
    page = render_page(report.rows, report.notes, pictures, made, command, sorted(files), more)
    try:
        output.mkdir(parents=True, exist_ok=True)
        superfluous = _listed(output / PAGE) - {PAGE, *files}
        for name, content in {PAGE: page, **files}.items():  # the page first: it lists the others as a report's
            write_atomically(output / name, content)
        for name in superfluous:
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}); name a folder with --output DIR") from error
    return output / PAGE


def default_output(place: Path) -> Path:
    """The default output folder for a report on `place`."""
    return place / ("report_of_runs" if is_run(place / "report") else "report")


def check_output(output: Path) -> None:
    """Refuse (ValueError) to write over what no report wrote, among the files of a run or an export, and where nothing
    can be written."""
    if is_run(output):
        raise ValueError(f"{output} is a run folder; name another with --output, such as {output / 'report'}")
    real = output.resolve()
    is_in_run = any(at.name == "checkpoints" and is_run(at.parent) for at in (real, *real.parents))
    if is_in_run or (output / "config.json").exists():
        raise ValueError(f"{output} is for a model's files; name another folder with --output")
    there = next(at for at in (real, *real.parents) if at.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is a file" if there.is_file() else "may not be written"
        raise ValueError(f"{there} {what}; name another folder with --output")
    ours = _listed(output / PAGE)
    for file in sorted(real.iterdir() if there == real else []):
        if OURS.fullmatch(file.name) and file.name not in ours:
            raise ValueError(f"{output / file.name} is no file of a report; name another folder with --output")


def _listed(page: Path) -> set[str]:
    """The page itself and the files that it lists as its report's; none if it is no report's page."""
    try:
        found = FILES.search(page.read_text(errors="replace"))
    except OSError:
        return set()
    return {page.name, *(name for name in found[1].split() if OURS.fullmatch(name))} if found else set()


def as_json(rows: list[Row]) -> str:
    """The rows as one JSON list, strict: a number that is not finite is null."""
    return "[" + ",\n ".join(to_strict_json(asdict(row)) for row in rows) + "]"
