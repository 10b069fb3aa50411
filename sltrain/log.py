"""Lines to the user, by the standard library's logging. Every module has a logger of its own:

    logger = logging.getLogger(__name__)
    logger.info("...")                      # known to all ranks: rank 0 prints it
    logger.warning("...", extra=ANY_RANK)   # known to this rank alone, such as a damaged file: "[rank 2] ..."
    Pace("read", "tokens").at(count)        # how far something is, now and then

What another library's error says goes into a line by `first_line` or `one_line`.

A command shows log messages as plain lines while it runs: `with lines_on("stderr"): ...`. A program that imports
sltrain sees warnings only, unless it configures logging.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
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


class Pace:
    """How far something is that takes minutes: a line every ten seconds, none for what takes less.

        pace = Pace("evaluated", "tokens", total=9_000_000)
        pace.at(1_200_000)  # evaluated 1,200,000 of 9,000,000 tokens, 40,000 a second, 03:15 left

    `total` None: nobody knows it. `tell` shows a line; the package's log by default.
    """

    SECONDS = 10.0  # between two lines, as of a run without a terminal

    def __init__(
        self,
        done: str,
        unit: str,
        total: int | None = None,
        tell: Callable[[str], None] = PACKAGE.info,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._done, self._unit, self._total, self._tell, self._clock = done, unit, total, tell, clock
        self._begin = self._last = clock()

    def at(self, count: int) -> None:
        """`count` of the units are done."""
        now = self._clock()
        if now - self._last < self.SECONDS:
            return
        from tqdm import tqdm

        self._last, rate = now, count / (now - self._begin)
        of_total = left = ""
        if self._total is not None:
            of_total = f" of {self._total:,}"
            left = f", {tqdm.format_interval(max(self._total - count, 0) / rate)} left" if rate else ""
        self._tell(f"{self._done} {count:,}{of_total} {self._unit}, {rate:,.{0 if rate >= 10 else 1}f} a second{left}")


def memory_size(num_bytes: int | None) -> str:
    """Bytes for people, in units of 1e9, or of 1e6 below 0.1 GB; None is unknown."""
    if num_bytes is None:
        return "an unknown amount"
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


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
