"""What the package logs: shown by a command on its stream, by rank 0 alone or by the rank that met it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain.log import ANY_RANK, Pace, first_line, lines_on, memory_size, one_line, write_line

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger("sltrain.somewhere")


def test_a_message_is_a_line_on_the_chosen_stream_while_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for stream in ("stdout", "stderr"):
        with lines_on(stream), lines_on("stderr"):  # the outer one decides
            logger.info("100 % of it")
            logger.debug("not this")
        logger.info("nor this")
        out, err = capsys.readouterr()
        assert {"stdout": (out, err), "stderr": (err, out)}[stream] == ("100 % of it\n", "")
    assert not logger.isEnabledFor(logging.INFO)


def test_as_a_library_it_is_quiet_but_for_warnings() -> None:
    code = "import logging, sltrain.log; log = logging.getLogger('sltrain.x'); log.info('a'); log.warning('b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "b\n")


def test_a_level_that_the_program_has_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger("sltrain")
    package.setLevel(logging.WARNING)
    try:
        with lines_on("stdout"):
            logger.info("progress")
            logger.warning("damage")
        assert package.level == logging.WARNING and capsys.readouterr().out == "damage\n"
    finally:
        package.setLevel(logging.NOTSET)


def test_rank_0_speaks_for_all_and_each_rank_for_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "2"):
        monkeypatch.setenv("RANK", rank)
        with lines_on("stdout"):
            logger.info("all know")
            logger.warning("a damaged file", extra=ANY_RANK)
    assert capsys.readouterr().out.splitlines() == ["all know", "a damaged file", "[rank 2] a damaged file"]


def test_what_takes_long_says_how_far_it_is_every_ten_seconds() -> None:
    said, now = list[str](), 0.0
    pace = Pace("read", "tokens", 4000, said.append, clock=lambda: now)
    unknown = Pace("read", "files", tell=said.append, clock=lambda: now)
    for second in range(0, 32, 2):
        now = float(second)
        pace.at(100 * second)
    assert said == [
        f"read {count:,} of 4,000 tokens, 100 a second, {left} left"
        for count, left in ((1000, "00:30"), (2000, "00:20"), (3000, "00:10"))
    ]
    unknown.at(15)
    assert said[3:] == ["read 15 files, 0.5 a second"]


def test_small_memory_is_no_0_gb() -> None:
    assert [memory_size(size) for size in (None, 0, 4_567_890, 99_900_000, 10**8, 1_234_567_890_123)] == [
        "an unknown amount",
        "0.0 MB",
        "4.6 MB",
        "99.9 MB",
        "0.10 GB",
        "1,234.57 GB",
    ]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_ends_nothing(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    pipe = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, stream, pipe)
    with lines_on(stream):
        logger.info("nobody reads this")
        logger.info("nor this")
    assert getattr(sys, stream) is not pipe and getattr(sys, stream).name == os.devnull
    with pytest.raises(BrokenPipeError):
        pipe.close()


def test_a_process_without_standard_output_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    write_line("to nobody")


@pytest.mark.parametrize(
    ("said", "first", "whole"),
    [
        ("\n wrong shape\nat line 3\n", "wrong shape", "wrong shape at line 3"),
        ("x" * 300, "x" * 300, "x" * 200),
        (" \n", "ValueError", "ValueError"),
    ],
)
def test_what_another_library_says_fits_a_line(said: str, first: str, whole: str) -> None:
    assert (first_line(ValueError(said)), one_line(ValueError(said))) == (first, whole)
