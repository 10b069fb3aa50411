"""One live process a run folder: a second one would mix two runs' checkpoints and logs."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0  # a reader (run_record.py) holds the lock for an instant


class RunLocked(ValueError):
    """Another live process owns the run folder. The message is for the user."""


class RunLock:
    """Holds `run_dir/.lock` from construction to `release` or the process's death.

    Raises RunLocked, naming the owner, while another process holds it. The lock is the kernel's flock, so a dead owner
    never blocks. On a file system without such locks a warning is logged and nothing is locked.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(run_dir / ".lock", "a+")
        try:
            self._take()
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise RunLocked(
                f"run_dir={run_dir} is in use by {owner}. Wait for it or stop it, or choose another run_dir."
            ) from None
        except OSError as error:
            logger.warning(f"{run_dir} cannot be locked ({error.strerror}): do not start a second run in it.")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        # A forked child shares the lock and would keep it after our death.
        os.register_at_fork(after_in_child=self._file.close)

    def _take(self) -> None:
        """Raises BlockingIOError if others hold the lock for longer than a reader does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def release(self) -> None:
        """Release the lock. May be called twice."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
