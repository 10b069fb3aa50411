"""Lines to the user, by the standard library's logging. Every module has a logger under its own name:

    logger = logging.getLogger(__name__)
    logger.info("...")                      # what all ranks know: rank 0 says it
    logger.warning("...", extra=ANY_RANK)   # what one rank alone met, such as a damaged file: "[rank 2] ..."

A command shows what is logged while it runs, each message as a line without a prefix: `with lines_on("stderr"): ...`.
A program that imports sltrain decides itself; unless it configures logging, it sees warnings only.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ANY_RANK = {"any_rank": True}  # `extra=` of what one rank alone knows
PACKAGE = logging.getLogger("sltrain")


class LineHandler(logging.Handler):
    """Writes messages to standard output or standard error ("stdout", "stderr"), as it is at that moment."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this rank says it."""
        return bool(super().filter(record)) and (rank() == 0 or getattr(record, "any_rank", False))

    def emit(self, record: logging.LogRecord) -> None:
        where = f"[rank {rank()}] " if rank() else ""
        try:
            write_line(where + record.getMessage(), self.stream)
        except Exception:
            self.handleError(record)


@contextmanager
def lines_on(stream: str) -> Iterator[None]:
    """While this lasts, what the package logs at level INFO and above is a line on "stdout" or "stderr", and goes to no
    other handler. A level that the package's logger already has stays."""
    if any(isinstance(handler, LineHandler) for handler in PACKAGE.handlers):  # someone further out shows it
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


def in_notebook() -> bool:
    """Whether progress bars are drawn as widgets: in a notebook that can show them."""
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    return issubclass(tqdm, tqdm_notebook)


def rank() -> int:
    """The number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def write_line(text: str, stream: str = "stdout") -> None:
    """Write a line to standard output or standard error, above the progress bar if there is one. A closed pipe, as
    after `| head`, is ignored: work goes on."""
    from tqdm import tqdm

    target = getattr(sys, stream)
    if target is None:
        return
    try:
        tqdm.write(text, file=target)
        target.flush()
    except BrokenPipeError:
        setattr(sys, stream, open(os.devnull, "w"))
