"""Commands in processes of their own, one after the other or several at once, until a signal asks to stop.

A signal to this process starts no other command and asks those that run to stop, with SIGTERM: a terminal's Ctrl-C has
reached them already, and a second SIGINT would end a run without saving.
"""

import os
import signal
import subprocess
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sltrain.errors import ExitCode
from sltrain.signals import ALWAYS, BY_DEFAULT_FATAL, stop_signals

INTERRUPTED = {ExitCode.INTERRUPTED, ExitCode.NOTHING_SAVED, *(-number for number in (*ALWAYS, *BY_DEFAULT_FATAL))}
SECONDS_BETWEEN_LOOKS = 0.1  # at processes of which any may end first
ONE_PLACE: Sequence[Mapping[str, str]] = ({},)


@dataclass
class Job:
    """A command, and the file that what it prints is appended to; None: it prints where this process does."""

    command: list[str]
    log: Path | None = None


J = TypeVar("J", bound=Job)


def run_process(command: list[str], log: Path | None = None) -> tuple[int, bool]:
    """Run one command; return its exit code (INTERRUPTED if a signal ended it) and whether that is a wish to stop."""
    ((_, code, is_stopped),) = run_processes([Job(command, log)])
    return code, is_stopped


def run_processes(
    jobs: Iterable[J], places: Sequence[Mapping[str, str]] = ONE_PLACE
) -> Generator[tuple[J, int, bool], None, None]:
    """Run jobs, as many at once as there are places, each with the environment of its place over this one's. Yield each
    when it has ended, as `run_process` returns it. A job is taken from `jobs` when its place is free. Closed before
    the end, it stops those that run. Raises KeyboardInterrupt for a wish to stop that no job's end has told."""
    received: list[int] = []
    is_told = False
    running: dict[int, tuple[J, subprocess.Popen[bytes]]] = {}  # by the number of the place

    def stop(number: int, frame: object) -> None:
        received.append(number)
        for _, process in list(running.values()):
            process.send_signal(signal.SIGTERM)

    waiting = iter(jobs)
    with ExitStack() as at_the_end:
        for number in stop_signals():
            at_the_end.callback(signal.signal, number, signal.signal(number, stop))
        at_the_end.callback(_stop_all, running)
        while True:
            for place in [place for place in range(len(places)) if place not in running]:
                if received or (job := next(waiting, None)) is None:
                    break
                running[place] = job, _start(job, places[place])
                if received:  # before the process was known
                    running[place][1].send_signal(signal.SIGTERM)
            if not running:
                if received and not is_told:
                    raise KeyboardInterrupt
                return
            place = _first_ended({place: process for place, (_, process) in running.items()})
            job, process = running.pop(place)
            code = process.wait()
            if code not in (ExitCode.OK, ExitCode.DIVERGED) and (received or code in INTERRUPTED):
                code = ExitCode.INTERRUPTED
            is_told = bool(received) or code == ExitCode.INTERRUPTED
            yield job, code, is_told


def _start(job: Job, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    with ExitStack() as opened:
        output = None if job.log is None else opened.enter_context(open(job.log, "ab"))
        return subprocess.Popen(job.command, stdout=output, stderr=output, env={**os.environ, **environment})


def _first_ended(processes: "Mapping[int, subprocess.Popen[bytes]]") -> int:
    """The place of a process that has ended."""
    while True:
        for place, process in processes.items():
            if len(processes) == 1:
                process.wait()
            if process.poll() is not None:
                return place
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _stop_all(running: "dict[int, tuple[J, subprocess.Popen[bytes]]]") -> None:
    for _, process in running.values():
        process.terminate()
    for _, process in running.values():
        process.wait()


def in_words(code: int) -> str:
    """How a process ended, by its exit code."""
    known = {
        ExitCode.OK: "finished",
        ExitCode.BAD_INPUT: "refused",
        ExitCode.INTERRUPTED: "interrupted",
        ExitCode.DATA_LOST: "data lost",
        ExitCode.DIVERGED: "diverged",
    }
    word = next((words for known_code, words in known.items() if known_code == code), "failed")
    return word if code == ExitCode.OK else f"{word} (exit code {code})"
