"""Run an iterator ahead in one background thread.

A thread, not a process: the data stream needs a fraction of a core (word_cache.py), so a thread keeps a GPU fed, and
there is no fork, no pickling and no second copy of the shuffle blocks.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
CLOSE_PATIENCE = (
    5.0  # seconds to wait for a thread that sits in a network call; it is a daemon, so it cannot outlive the process
)


class Prefetcher(Generic[T]):
    """Iterator over `items` with up to `depth` of them ready. An exception of `items` is raised here, after the items
    before it."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        thread = threading.Thread(target=_run, args=(items, self._queue, self._stop), name="sltrain-data", daemon=True)
        # Also runs at interpreter exit: a thread inside Rust or C must not meet an interpreter that is torn down.
        self._finalizer = weakref.finalize(self, _shut_down, self._queue, self._stop, thread)
        self._failure: BaseException | None = None
        self._next: tuple[T | None, BaseException | None] | None = None  # taken from the queue, not yet given out
        thread.start()

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise StopIteration
        item, failure = self._next or self._queue.get()
        self._next = None
        if failure is not None:
            self._failure = failure
            raise failure
        assert item is not None
        return item

    def wait(self, seconds: float) -> bool:
        """Wait for the next item, at most so long; whether `next` would return at once."""
        if self._next is None and self._failure is None and not self._stop.is_set():
            try:
                self._next = self._queue.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def close(self) -> None:
        """Stop the thread and drop what is ready. May be called twice."""
        self._finalizer()


def _run(
    items: Iterator[T], ready: "queue.Queue[tuple[T | None, BaseException | None]]", stop: threading.Event
) -> None:
    entry: tuple[T | None, BaseException | None]
    while not stop.is_set():
        try:
            entry = next(items), None
        except BaseException as error:
            entry = None, error
        _put(entry, ready, stop)
        if entry[1] is not None:
            return


def _put(entry: tuple, ready: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            ready.put(entry, timeout=0.1)
            return
        except queue.Full:
            continue


def _shut_down(ready: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(CLOSE_PATIENCE)
    while not ready.empty():
        ready.get_nowait()
