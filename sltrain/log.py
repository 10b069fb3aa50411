"""Lines to the user, by the standard library's logging. Every module has a logger of its own:

    logger = logging.getLogger(__name__)
    logger.info("...")                      # known to all ranks: rank 0 prints it
    logger.warning("...", extra=ANY_RANK)   # known to this rank alone, such as a damaged file: "[rank 2] ..."

What another library's error says goes into a line by `first_line` or `one_line`.

A command shows log messages as plain lines while it runs: `with lines_on("stderr"): ...`. A program that imports
sltrain sees warnings only, unless it configures logging.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ANY_RANK = {"any_rank": True}  # `extra=` of a message that only this rank can give
PACKAGE = logging.getLogger("sltrain")


class LineHandler(logging.Handler):
    """Writes messages to sys.stdout or sys.stderr ("stdout", "stderr"), looked up at every message."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this rank prints the record."""
        return bool(super().filter(record)) and (rank() == 0 or getattr(record, "any_rank", False))

    def emit(self, record: logging.LogRecord) -> None:
        where = f"[rank {rank()}] " if rank() else ""
        try:
            write_line(where + record.getMessage(), self.stream)
        except Exception:
            self.handleError(record)


@contextmanager
def lines_on(stream: str) -> Iterator[None]:
    """Inside this context the package's messages of level INFO and above are lines on "stdout" or "stderr" and reach no
    other handler. A level already set on the package's logger is kept. Inner contexts change nothing."""
    if any(isinstance(handler, LineHandler) for handler in PACKAGE.handlers):  # an outer context
        yield
        return
    handler, level, propagate = LineHandler(stream), PACKAGE.level, PACKAGE.propagate
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(level or logging.INFO)
    PACKAGE.propagate = False
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)
        PACKAGE.propagate = propagate


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the page that follows; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """What an error of another library says, its lines joined and cut after 200 characters, without a full stop; its
    type if it says nothing."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def in_notebook() -> bool:
    """Whether progress bars are drawn as widgets: in a notebook that can show them."""
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    return issubclass(tqdm, tqdm_notebook)


def rank() -> int:
    """The number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def write_line(text: str, stream: str = "stdout") -> None:
    """Write a line to standard output or standard error, above the progress bar if there is one. One that cannot
    be written to any more is given up: os.devnull takes its place."""
    from tqdm import tqdm

    target = getattr(sys, stream)
    if target is None:
        return
    try:
        tqdm.write(text, file=target)
        target.flush()
    except (OSError, ValueError):  # the reader has gone, the terminal or the file is closed
        setattr(sys, stream, open(os.devnull, "w"))
