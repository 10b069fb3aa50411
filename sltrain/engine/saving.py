"""When a checkpoint is written: at once, or by a thread while training goes on (checkpoint_async=true).

    copy to host memory              training waits (snapshot.py)
    write, hash, fsync, rename       a thread of rank 0, or of every process for its share; training goes on
    "checkpoint" line, `saved_step`  before the next update after that, or where a save is waited for

One checkpoint is written at a time: the next save, the final line and the end of the run wait for it. It counts as
saved once its folder has its final name, never before. If the disk refuses, every rank raises that error before its
next update, as it would have done without the thread. Splitting a save into these two parts is from CheckFreq (Mohan et
al., FAST 2021).

The thread of rank 0 needs no process group; threads that write together have one of their own, as collectives of a
group come in one order. Their work is in safetensors, torch and the operating system, which let other threads of
Python run meanwhile.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.snapshot import HostCopy

logger = logging.getLogger(__name__)

LONG_WAIT_SECONDS = 1.0  # of a save for the one before


@dataclass
class Save:
    """One save: where the run was, and how long it took."""

    step: int
    tokens: int
    positions: int
    began: float = field(default_factory=time.perf_counter)  # the clock of the following
    blocked_seconds: float = 0.0  # until training went on
    seconds: float = 0.0  # until the folder had its name
    path: Path | None = None  # of that folder


class Saves:
    """The saves of a run, one after the other. All ranks call `begin` and `finish` together.

    Args:
        in_background: let a thread write; False: `begin` returns when the checkpoint is written.
        step: of the checkpoint that the run continues from; 0: of none.
    """

    def __init__(self, checkpointer: Checkpointer, ranks: Ranks, in_background: bool = False, step: int = 0) -> None:
        self.checkpointer, self.ranks, self.in_background = checkpointer, ranks, in_background
        self.begun_step = self.saved_step = step or -1  # of the newest save; saved: as far as this rank knows
        self.host = HostCopy()
        self._writes = ranks.is_main or checkpointer.together is not None
        self._on_writers = ranks.on_main if checkpointer.together is None else ranks.everywhere
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_background and self._writes else None
        self._pending: Save | None = None  # begun and not finished, on all ranks
        self._writing: Future[tuple[Path, float]] | None = None  # what was not told of yet, where it is written

    @property
    def has_failed(self) -> bool:
        """Whether the thread's last error waits to be raised by `finish`; where there is one."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def reserve(self, contents: Contents) -> None:
        """Find the memory for copies, unless it is in use: not for the first time in the middle of the run."""
        if self._pool is not None and self._writing is None:
            self.host.take(contents)

    def begin(self, save: Save, contents: Contents, in_background: bool = True) -> None:
        """Save these contents, in the background if both this call and the run say so; after `finish`. Raises
        CheckpointError on every rank if what is written at once failed.

        Ranks agree on the copies before anyone writes: those who write together would wait for one that has none."""
        assert self._pending is None
        if in_background and self.in_background:
            copies: list[Contents] = []
            self._on_writers(lambda: copies.append(self.host.take(contents)))
            if self._pool is not None:
                self._writing = self._pool.submit(self._write, *copies)
        else:
            if self._writes:
                self._writing = self._written_at_once(contents)
            self._on_writers(self._wait)
        save.blocked_seconds = time.perf_counter() - save.began
        self.begun_step = save.step
        self._pending = save

    def written(self) -> Save | None:
        """Once, where it is written: what has been written since it began; None if nothing was, or it failed."""
        save = self._pending
        if save is None or self._writing is None or not self._writing.done() or self.has_failed:
            return None
        path, ended = self._writing.result()
        self._writing = None
        save.path, save.seconds = path, ended - save.began
        save.blocked_seconds = min(save.blocked_seconds, save.seconds)
        self.saved_step = save.step
        return save

    def finish(self) -> Save | None:
        """Wait for what is being written, on every rank, and return it, unless `written` has. Raises CheckpointError on
        every rank if it failed."""
        if self._pending is None:
            return None
        try:
            self._on_writers(self._wait)
            self.saved_step = self._pending.step
            return self.written()
        finally:
            self._pending = None

    def close(self) -> Save | None:
        """As `finish` where ranks may be gone: nothing is raised, and a failure that was not is a warning."""
        if self._pool is not None:
            self._pool.shutdown()
        if self.has_failed:
            assert self._writing is not None
            logger.warning(str(self._writing.exception()))
        return self.written()

    def free(self) -> None:
        """Give the memory for copies back; after `finish`."""
        self.host.free()

    def _written_at_once(self, contents: Contents) -> "Future[tuple[Path, float]]":
        done: Future[tuple[Path, float]] = Future()
        try:
            done.set_result(self._write(contents))
        except (OSError, ValueError) as error:
            done.set_exception(error)
        return done

    def _write(self, contents: Contents) -> tuple[Path, float]:
        return self.checkpointer.write(contents), time.perf_counter()

    def _wait(self) -> None:
        """Until the thread is done; raises its error, once."""
        if self._writing is not None and self._writing.exception() is not None:
            failed, self._writing = self._writing, None
            failed.result()
