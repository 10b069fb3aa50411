"""A clock that only the test moves, and a benchmark as the command starts it."""

from collections.abc import Callable
from types import ModuleType

import pytest

from sltrain.benchmarks.base import Bench, start_bench
from sltrain.benchmarks.settings import read_arguments


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
def clock_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Gives modules one clock of their own."""

    def replace(*modules: ModuleType) -> Clock:
        clock = Clock()
        for module in modules:
            monkeypatch.setattr(module, "time", clock)
        return clock

    return replace


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """A benchmark from the arguments of the command."""
    return lambda *arguments: start_bench(read_arguments(list(arguments)))
