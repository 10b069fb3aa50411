"""One live process a run folder, on one machine or on several that share it: a second one would mix two runs'
checkpoints and logs.

Two signs show an owner that lives:

    flock   the kernel's lock on `.lock`, which ends with its process. NFS and Lustre carry it to other machines if
            they are mounted so; else it holds on one machine only.
    beat    a number in the file that the owner raises every few seconds. A start on another machine, or where there are
            no locks, watches it: if it grows the folder is in use, if not its owner is dead.

So a start waits only after an owner elsewhere that did not end properly. What the file says after that is who the last
owner was; run_record.py reads it.
"""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0  # a reader (run_record.py) holds the lock for an instant
RESTART_PATIENCE_SECONDS = 60.0  # after a restart by torchrun the process before may be ending still, elsewhere
BEAT_SECONDS = 5.0
BEATS_WATCHED = 3.2  # how long a start looks whether an owner elsewhere lives; file systems show changes late


class RunLocked(ValueError):
    """Another live process owns the run folder. The message is for the user."""


class RunLock:
    """Holds `run_dir/.lock` from construction to `release` or the process's death.

    Raises RunLocked, naming the owner, while another process holds it. On a file system without locks a warning is
    logged, and only the beat protects the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self._run_dir / ".lock"
        self._file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            has_lock = self._take()
            self._watch_owner(has_lock)
        except RunLocked:
            self._file.close()
            raise
        self._beats, self._stop = 0, threading.Event()
        self._text = ""
        self._write()
        # A forked child shares the lock and would keep it after our death.
        os.register_at_fork(after_in_child=self._file.close)
        self._thread = threading.Thread(target=self._beat, name="sltrain-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock. May be called twice."""
        self._stop.set()
        self._thread.join(2 * BEAT_SECONDS)  # its beat may be under way, or hang where the file system does
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.ftruncate(self._file.fileno(), len(_owner()))  # no beat: it ended properly
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def _take(self) -> bool:
        """Take the kernel's lock; False if the file system has none."""
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        deadline = time.monotonic() + (RESTART_PATIENCE_SECONDS if restarted else PATIENCE_SECONDS)
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._refusal(self._path.read_text(errors="replace")) from None
            except OSError as error:
                logger.warning(f"{self._run_dir} cannot be locked ({error.strerror}): do not start a second run in it.")
                return False
            time.sleep(0.02)

    def _watch_owner(self, has_lock: bool) -> None:
        """Look whether the last owner lives where its lock cannot be seen. Raises RunLocked if it does."""
        before = self._path.read_text(errors="replace")
        name, *signs = before.splitlines() or [""]
        if len(signs) < 2 or (has_lock and signs[0] == _machine()):
            return
        seconds = BEATS_WATCHED * BEAT_SECONDS
        logger.info(
            f"waiting up to {seconds:.0f} s for a sign of life of {name}, which did not release {self._run_dir}"
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
            now = self._path.read_text(errors="replace")  # opened anew: NFS then asks the server
            if now != before:
                raise self._refusal(now or before)

    def _refusal(self, text: str) -> RunLocked:
        owner = (text.strip().splitlines() or ["another process"])[0]
        return RunLocked(
            f"run_dir={self._run_dir} is in use by {owner}. Wait for it or stop it, or choose another run_dir."
        )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if not self._is_ours():
                    logger.error(
                        f"{self._run_dir} was taken by another process while this one was stopped: end one of them"
                    )
                    return
                self._write()
            except (OSError, ValueError):  # a disk that is full or gone; the file was closed
                continue

    def _is_ours(self) -> bool:
        """Whether no other process has taken the folder."""
        return self._path.read_text(errors="replace") in (self._text, "")

    def _write(self) -> None:
        """Say who owns the folder, and that it lives. Every beat has the same length, so no reader sees a part."""
        self._beats += 1
        text = f"{_owner()}{_machine()}\n{self._beats:020d}\n"
        if not self._text:
            os.ftruncate(self._file.fileno(), 0)
        os.pwrite(self._file.fileno(), text.encode(), 0)
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())  # NFS sends it to the server now
        self._text = text


def owner_of(run_dir: Path) -> list[str]:
    """Which process, on which machine, last owned the folder; nothing if none did, or none that this machine sees."""
    try:
        return (Path(run_dir) / ".lock").read_text(errors="replace").splitlines()[:2]
    except OSError:
        return []


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def _machine() -> str:
    """This machine until it is started again: names may be the same, as in containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
