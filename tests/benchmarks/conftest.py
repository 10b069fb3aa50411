"""A clock that only the test moves: what is measured is then known, however busy the machine is."""

from collections.abc import Callable
from types import ModuleType

import pytest


class Clock:
    """Stands in for the module `time`. A sleep takes exactly as long as it should; work takes processor time too."""

    def __init__(self) -> None:
        self.now = self.processor = 0.0
        self.others = 0.0  # processor seconds that another thread still wants

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.processor += seconds

    def sleep(self, seconds: float) -> None:
        done = min(seconds, self.others)
        self.others -= done
        self.processor += done
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.processor


@pytest.fixture
def clock_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Clock]:
    """Gives a module a clock of its own."""

    def replace(module: ModuleType) -> Clock:
        clock = Clock()
        monkeypatch.setattr(module, "time", clock)
        return clock

    return replace
