"""Standard output and standard error of a command, which may vanish at any time: a reader leaves (`| head`), a terminal
closes, the disk under a log fills up, or there was none of the two from the beginning (`>&-`).

What cannot be written is dropped. Nothing that prints has to expect an error, in this package or another: neither print
and progress bars, nor logging, nor Python when it ends.
"""

import io
import os
import select
import sys
from typing import Any, TextIO


class _Outlet(io.FileIO):
    """A file descriptor that accepts everything. `is_lost` while it cannot be written to."""

    is_lost = False

    def write(self, content: Any) -> int:
        try:
            while (count := super().write(content)) is None:  # a pipe that does not block, and a slow reader
                select.select([], [self], [])
        except OSError:
            self.is_lost = True
            return len(content)
        self.is_lost = False
        return count


def secure_streams() -> None:
    """Give the process a standard output and a standard error that can always be written to. Characters that they
    cannot encode become escapes."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: otherwise the next file to be opened would get the number, and what others print
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _secured(sys.stdout, 1), _secured(sys.stderr, 2)


def _secured(stream: TextIO | None, number: int) -> TextIO:
    try:
        descriptor = number if stream is None else stream.fileno()
    except (AttributeError, OSError, ValueError):  # no file, such as a test's
        assert stream is not None
        return stream
    encoding, errors = getattr(stream, "encoding", "utf-8"), getattr(stream, "errors", "strict")
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(descriptor, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace" if errors == "strict" else errors,
        line_buffering=stream is not None and (stream.isatty() or number == 2),
    )


def is_lost(stream: TextIO | None) -> bool:
    """Whether nobody receives what is written to a stream that `secure_streams` made."""
    outlet = getattr(getattr(stream, "buffer", None), "raw", None)
    return isinstance(outlet, _Outlet) and outlet.is_lost
