"""One live process a folder; a dead one never blocks."""

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sltrain.runs import lock as lock_module
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


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A folder on a file system whose locks end at the machine; called with a name, this process is on that machine."""
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.2)

    def move(machine: str) -> None:
        monkeypatch.setattr(lock_module, "_machine", lambda: machine)

    return move


def test_an_owner_on_another_machine_is_known_by_its_beat(
    tmp_path: Path, in_child: Callable[[Callable[[], None]], int], two_machines: Callable[[str], None]
) -> None:
    reading, writing = os.pipe()

    def hold() -> None:
        two_machines("a")
        lock = RunLock(tmp_path)
        os.write(writing, b"held")
        time.sleep(60)
        lock.release()

    owner = in_child(hold)
    assert os.read(reading, 4) == b"held"
    os.close(reading)
    os.close(writing)
    try:
        two_machines("b")
        with pytest.raises(RunLocked, match=f"in use by process {owner} on "):
            RunLock(tmp_path)
        os.kill(owner, signal.SIGSTOP)  # as dead as it can be without leaving
        lock = RunLock(tmp_path)
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        lock.release()
    finally:
        os.kill(owner, signal.SIGKILL)


def test_a_beat_under_way_ends_before_the_lock_is_released(
    tmp_path: Path, two_machines: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would write over what the release leaves, or into the next file that gets this one's number."""
    beating, write = threading.Event(), os.pwrite

    def slow(*args: Any) -> int:
        beating.set()
        time.sleep(0.2)
        return write(*args)

    two_machines("a")
    lock = RunLock(tmp_path)
    monkeypatch.setattr(os, "pwrite", slow)
    assert beating.wait(10)
    lock.release()
    other = tmp_path / "other"
    with open(other, "w"):
        time.sleep(0.4)
    assert other.read_text() == ""
    assert len((tmp_path / ".lock").read_text().splitlines()) == 1


def test_a_folder_that_was_released_is_taken_at_once(
    tmp_path: Path, two_machines: Callable[[str], None], lines: list[str]
) -> None:
    two_machines("a")
    RunLock(tmp_path).release()
    assert len((tmp_path / ".lock").read_text().splitlines()) == 1
    two_machines("b")
    RunLock(tmp_path).release()
    assert not lines


def test_whoever_loses_the_folder_says_so(
    tmp_path: Path, two_machines: Callable[[str], None], lines: list[str]
) -> None:
    two_machines("a")
    lock = RunLock(tmp_path)
    others = "process 1 on elsewhere\nb\n00000000000000000001\n"
    (tmp_path / ".lock").write_text(others)
    deadline = time.monotonic() + 20
    while not lines and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "was taken by another process" in lines[0]
    lock.release()
    assert (tmp_path / ".lock").read_text() == others


def test_after_a_restart_by_torchrun_the_process_before_is_waited_for(
    tmp_path: Path, in_child: Callable[[Callable[[], None]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()

    def hold() -> None:
        lock = RunLock(tmp_path)
        os.write(writing, b"held")
        time.sleep(2)
        lock.release()

    owner = in_child(hold)
    assert os.read(reading, 4) == b"held"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    RunLock(tmp_path).release()
    os.waitpid(owner, 0)
