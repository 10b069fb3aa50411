"""`sltrain-report`: runs side by side, as a table, figures and one page to read, send or print.

    sltrain-report outputs                      every run below outputs/; the page is outputs/report/report.html
    sltrain-report outputs/a /mnt/cluster/b     from several places; the page is in the first
    sltrain-report outputs --output /tmp/look   page, figures, table.md and table.csv go there
    sltrain-report outputs --json               the rows on stdout, as one JSON list
    sltrain-report outputs --best method        of each method its best run alone, in table, figures and page
    sltrain-report outputs/a --spectrum         and the singular values of W, BA and S, of one run
    sltrain-report --study outputs/studies/a    the page of a study (sltrain-compare), from its ledger alone

Runs may be finished, running, interrupted or crashed, of this machine or copied from another: they are only read.
What is missing or damaged is named, and the rest reported. Where there is no run, the page cannot
be written, or the spectrum cannot be had, the answer is 2, and an earlier report stays as it is.

Parameters are those at the end of a run, or after its newest update. Memory is the highest of the whole run, in all its
phases: of the process with all that happens between updates, of tensors in an update.
"""

import argparse
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sltrain.commands.flags import make_parser
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on, write_line

if TYPE_CHECKING:
    from sltrain.reporting.page import Section

logger = logging.getLogger("sltrain.commands")  # __name__ may be __main__

PROG = "sltrain-report"


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command)


def arguments_parser() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = make_parser(PROG, __doc__ or "")
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="a run folder, or one with runs below it")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="where to write; by default report, in the first PATH"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list instead of the table")
    parser.add_argument(
        "--best", metavar="KEYS", help="one run for each value of a key, or of several: method,lr_scale.factor"
    )
    parser.add_argument("--study", action="store_true", help="PATH is the folder of a study: draw its page, study.md")
    parser.add_argument("--spectrum", action="store_true", help="of one run: look inside its layers")
    parser.add_argument(
        "--layers",
        metavar="PATTERN",
        nargs="+",
        help="of the spectrum, as in rank_overrides; by default the first, the middle and the last decoder layer",
    )
    parser.add_argument(
        "--step",
        "--steps",
        dest="steps",
        metavar="N",
        type=int,
        nargs="+",
        help="of the spectrum; by default the newest checkpoint",
    )
    return parser


@lines_on("stderr")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-report` with these arguments and return its exit code."""
    try:
        typed = arguments_parser().parse_args(arguments)
        if (typed.layers or typed.steps) and not typed.spectrum:
            raise ValueError("--layers and --step say of what to draw the spectrum; add --spectrum")
        if typed.spectrum and len(typed.paths) > 1:
            raise ValueError("--spectrum looks into one run; name one run folder")
        if typed.study:
            return study_page(typed)
        from sltrain.api.report import as_json, check_output, default_output, read_report, write_report
        from sltrain.reporting.table import aligned, text_table

        report = read_report([path.expanduser() for path in typed.paths], typed.best)
        if not report.rows:
            raise ValueError("; ".join(report.notes))
        for note in report.notes:
            logger.info(f"note: {note}")
        output = typed.output.expanduser() if typed.output else default_output(report.first or typed.paths[0])
        check_output(output)
        spectrum = spectrum_of(typed) if typed.spectrum else None  # first: what is refused prints no table
        write_line(as_json(report.rows) if typed.json else text_table(report.rows))
        if spectrum is not None:
            write_line(f"\n{aligned(spectrum.tables[0])}\n", "stderr" if typed.json else "stdout")
        command = f"cd {shlex.quote(os.getcwd())}\n{shlex.join([PROG, *arguments])}"
        page = write_report(report, output, command, spectrum)
        write_line(f"page: {page}", "stderr" if typed.json else "stdout")
    except Exception as error:
        return report_error(error)
    return ExitCode.OK


def study_page(typed: argparse.Namespace) -> ExitCode:
    """Draw the page of a study. Raises ValueError if there is none, or another kind of report is asked for too."""
    if len(typed.paths) > 1 or typed.json or typed.best or typed.spectrum:
        raise ValueError("--study draws the page of one study; name one folder, without --json, --best and --spectrum")
    from sltrain.api.ledger import draw_study, read_ledger, study_table
    from sltrain.reporting.table import aligned

    folder = typed.paths[0].expanduser()
    ledger = read_ledger(folder)
    if (table := study_table(ledger)) is not None:
        write_line(aligned(table))
    page = draw_study(ledger, typed.output.expanduser() if typed.output else folder, f"{PROG} --study {folder}")
    write_line(f"page: {page}")
    return ExitCode.OK


def spectrum_of(typed: argparse.Namespace) -> "Section":
    """Look inside the one run."""
    from sltrain.api.spectrum import look_inside

    return look_inside(typed.paths[0], layers=typed.layers, steps=typed.steps)


if __name__ == "__main__":
    main()
