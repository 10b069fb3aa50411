"""A request to stop, set by SIGTERM or SIGINT and read by the loop between two steps.

The first signal lets the run finish its step, save and exit. A second SIGINT (an impatient Ctrl-C) ends the process at
once, which loses only the steps since the last checkpoint. Python lets only the main thread handle signals: a run in
another thread leaves them to the program.
"""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager; while it is open, SIGTERM and SIGINT set `signal_name` instead of ending the process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> "StopRequest":
        handled = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        for number in handled:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
