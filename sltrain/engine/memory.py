"""Peak memory of the training process, and the name of what was measured.

CUDA: the most bytes that tensors held at once (torch's allocator), and the most it had reserved from the device.

CPU: the most physical memory the process held (VmHWM of /proc/self/status), Python and its libraries included. Linux
can reset that mark; elsewhere the peak of the whole process so far stands in for it.
"""

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory on `device` since construction or the last `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self.measure = "cuda max_memory_allocated" if self._is_cuda else "peak resident size"
        self.reset()

    def reset(self) -> None:
        """Begin a new measurement, so that one sweep job does not inherit the peak of the one before."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR_REFS.write_text("5")  # man 5 proc: sets VmHWM back to the present size
        except OSError:
            pass  # not Linux, or not allowed: the peak stays that of the whole process

    def peak_bytes(self) -> int:
        """The peak, in bytes."""
        return torch.cuda.max_memory_allocated(self._device) if self._is_cuda else _peak_resident_bytes()

    def reserved_bytes(self) -> int | None:
        """The most bytes that torch's allocator had reserved from the GPU; None on the CPU."""
        return torch.cuda.max_memory_reserved(self._device) if self._is_cuda else None


def _peak_resident_bytes() -> int:
    try:
        mark = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        mark = None
    if mark:
        return int(mark[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, everyone else KiB
