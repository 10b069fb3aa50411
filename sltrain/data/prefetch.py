"""Run an iterator ahead in one background thread.

A thread, not a process: the data stream needs a fraction of a core (word_cache.py), so a thread keeps a GPU fed, and
there is no fork, no pickling and no second copy of the shuffle blocks.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Entry = tuple[Any, BaseException | None]  # an item, or what ended the iterator
CLOSE_PATIENCE = 5.0  # seconds to wait for a thread inside a network call; it is a daemon and dies with the process


class Prefetcher(Generic[T]):
    """Iterator over `items` that keeps up to `depth` of them ready, and raises their exception after the last item."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[Entry] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        thread = threading.Thread(target=_run, args=(items, self._ready, self._stop), name="sltrain-data", daemon=True)
        # Also runs at interpreter exit: a thread inside Rust or C must not meet an interpreter that is torn down.
        self._finalizer = weakref.finalize(self, _shut_down, self._stop, thread)
        self._next: Entry | None = None  # taken from the queue, not yet returned; an exception stays here
        thread.start()

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        self._next = self._next or self._ready.get()
        item, failure = self._next
        if failure is not None:
            raise failure
        self._next = None
        return item

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next item; return whether `next` would return at once."""
        if self._next is None and not self._stop.is_set():
            try:
                self._next = self._ready.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def close(self) -> None:
        """Stop the thread; there are no more items. May be called twice."""
        self._finalizer()


def _run(items: Iterator[T], ready: "queue.Queue[Entry]", stop: threading.Event) -> None:
    entry: Entry = None, None
    while entry[1] is None and not stop.is_set():
        try:
            entry = next(items), None
        except BaseException as error:
            entry = None, error
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                break
            except queue.Full:
                continue


def _shut_down(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(CLOSE_PATIENCE)
