"""`profile_steps=[first,last]`: a trace of these updates by torch's profiler, for chrome://tracing or ui.perfetto.dev.

Rank 0 records what its CPU and its GPU do, from the beginning of update `first` to the end of update `last`; in the
trace each update is a span named "update N". Waiting for data, evaluations and checkpoints between two of these updates
are part of it. Recording changes no number of the run, but the recorded updates are slower.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Profile:
    """Records updates `first` to `last` into `folder`/trace_FIRST-LAST.json.gz (those that this process made).

    Args:
        folder: of the run.
        first, last: updates, counted from 1; last included.
        device: whose kernels are recorded besides what the CPU does.
    """

    def __init__(self, folder: Path, first: int, last: int, device: torch.device) -> None:
        self._folder, self._steps = folder, range(first, last + 1)
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler: torch.profiler.profile | None = None
        self._recorded: list[int] = []

    def covers(self, step: int) -> bool:
        """Whether this update is one to record."""
        return step in self._steps

    def record(self, step: int, update: Callable[[], T]) -> T:
        """The result of `update`, recorded; after the last one the trace is written."""
        if self._profiler is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to stderr when it starts and stops
            self._profiler = torch.profiler.profile(activities=self._activities)
            self._profiler.start()
        with torch.profiler.record_function(f"update {step}"):
            result = update()
        self._recorded.append(step)
        if step == self._steps[-1]:
            self.close()
        return result

    def close(self) -> None:
        """End the recording and write the updates so far, if there are any. A disk that is full costs a warning."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if not self._recorded:
            return
        path = self._folder / f"trace_{self._recorded[0]}-{self._recorded[-1]}.json.gz"
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning(f"profile_steps: {path} could not be written: {error}")
            return
        logger.info(f"profile    {path}: open it in chrome://tracing or ui.perfetto.dev")
