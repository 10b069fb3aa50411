"""One live process a folder; a dead one never blocks."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sltrain.runs.lock import RunLock, RunLocked


def test_lock_is_refused_across_processes_and_freed_by_death(
    tmp_path: Path, in_child: Callable[[Callable[[], None]], int]
) -> None:
    reading, writing = os.pipe()

    def hold() -> None:
        lock = RunLock(tmp_path)
        worker = in_child(lambda: time.sleep(30))  # outlives its parent, and must not keep the lock
        os.write(writing, f"{worker}\n".encode())
        time.sleep(30)
        lock.release()

    owner = in_child(hold)
    with open(reading) as pipe:
        worker = int(pipe.readline())
    os.close(writing)
    try:
        with pytest.raises(RunLocked, match=f"in use by process {owner} on ") as caught:
            RunLock(tmp_path)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        lock = RunLock(tmp_path)
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
            RunLock(tmp_path)
        lock.release()
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).release()
    assert len(lines) == 1 and "cannot be locked" in lines[0]


def test_a_look_at_the_lock_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunLock(tmp_path).release()
    with open(tmp_path / ".lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        RunLock(tmp_path).release()
