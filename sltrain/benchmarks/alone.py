"""A function in a fresh process of its own, so that a peak of memory is its own and a killed one costs one row."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


class Died(Exception):
    """The process ended without an answer; the system kills one that takes too much memory."""


def run_alone(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, run in a new interpreter. Function, arguments and result must be picklable. An exception
    of the function is raised here; raises Died if the process was killed."""
    context = multiprocessing.get_context("spawn")  # a forked process would begin with this one's memory
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()  # this end; the child holds the other
    try:
        answer = receiving.recv()
    except EOFError as error:
        process.join()
        raise Died(f"the process ended with exit code {process.exitcode}") from error
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(sending: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the parent speaks
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    sending.send(result)
