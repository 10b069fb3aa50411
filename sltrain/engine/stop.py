"""A request to stop, set by a signal (signals.py) and read by the loop between two steps.

The first signal lets the run finish its step, save and exit. A second SIGINT (an impatient Ctrl-C) ends the process at
once, which loses only the steps since the last checkpoint; while one is written, it waits for that. Python lets only
the main thread handle signals: a run in another thread leaves them to the program.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sltrain.signals import stop_signals


class StopRequest:
    """Context manager; while it is open, a signal sets `signal_name` instead of ending the process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._num_interrupts = 0
        self._is_shielded = False
        self._previous: dict[int, Any] = {}

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> "StopRequest":
        handled = stop_signals() if threading.current_thread() is threading.main_thread() else ()
        for number in handled:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """What is done inside is not broken off; after it, the loop sees that it is to stop."""
        self._is_shielded = True
        try:
            yield
        finally:
            self._is_shielded = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1 and not self._is_shielded:
            raise KeyboardInterrupt
