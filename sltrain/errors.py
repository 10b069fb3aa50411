"""Exit codes, and errors in one or two lines instead of a traceback.

What a user can fix is raised as ValueError (by the system as OSError), with a message that says what is wrong and what
to change. Anything else is an internal error and shows its traceback. SLTRAIN_DEBUG=1 always shows it.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NoReturn

from sltrain.log import rank
from sltrain.signals import stop_signals
from sltrain.streams import secure_streams


class ExitCode(IntEnum):
    """Exit codes of every command; under torchrun, torchrun's own code replaces them."""

    OK = 0
    FAILED = 1  # internal error, or a sweep with a failed job
    BAD_INPUT = 2  # invalid input or environment: the user can fix it
    INTERRUPTED = 3  # by a signal; the run is saved
    DATA_LOST = 4  # network lost; what was trained was saved
    DIVERGED = 5  # the loss or the gradients stayed non-finite
    RANK_LOST = 6  # another process of the run hangs or is gone; the last checkpoint is kept
    NOTHING_SAVED = 130  # a training run was interrupted before its first checkpoint; 128 + SIGINT, as of a shell


class Error(ValueError):
    """`sltrain.Error`: raised by the library for what the caller can fix. The message says what is wrong and what to
    change; `__cause__` is the original error."""


class RankLost(RuntimeError):
    """Another process of the run is gone; the message says what is kept."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a training run at once; `is_saved`: its folder holds a checkpoint."""

    def __init__(self, message: str, is_saved: bool) -> None:
        super().__init__(message)
        self.is_saved = is_saved

    @property
    def code(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self.is_saved else ExitCode.NOTHING_SAVED


@contextmanager
def raised_as_error() -> Iterator[None]:
    """Convert ValueError and OSError to `Error`, message unchanged. For the public functions of the library."""
    try:
        yield
    except Error:
        raise
    except (ValueError, OSError) as error:
        raise Error(str(error)) from error


def run_as_process(
    run_command: Callable[[list[str]], ExitCode],
    interrupted: str = "interrupted",
    interrupted_code: ExitCode = ExitCode.INTERRUPTED,
) -> NoReturn:
    """Run a command on the arguments that were typed, and end the process with its code. A signal that ends the command
    before it reports anything itself ends with the message `interrupted` and that code."""
    secure_streams()
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    try:
        code = run_command(sys.argv[1:])
    except KeyboardInterrupt as error:
        if rank() == 0:
            print(str(error) or interrupted, file=sys.stderr)
        code = error.code if isinstance(error, Interrupted) else interrupted_code
    sys.exit(code)


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code for an exception that ended a command."""
    if isinstance(error, RankLost):
        return ExitCode.RANK_LOST
    return ExitCode.BAD_INPUT if isinstance(error, ValueError | OSError) else ExitCode.FAILED


def report_error(error: BaseException, common: bool = False) -> ExitCode:
    """Print an exception for a person on stderr and return the exit code that goes with it.

    Under torchrun an error that all ranks have (`common`), or that another rank reports, is printed once.
    """
    code = exit_code_of(error)
    if getattr(error, "told_by_another_rank", False) or (common and rank()):
        return code
    if code == ExitCode.FAILED or os.environ.get("SLTRAIN_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    where = f"[rank {rank()}] " if rank() else ""
    message = "\n".join(str(error).splitlines()[:2])  # other libraries go on for a page
    print(f"{where}error: {message}", file=sys.stderr, flush=True)
    return code
