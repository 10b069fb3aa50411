"""Memory of the training process: the peak of the process, the peak of its tensors, and what is free.

The process. CUDA: the most bytes that tensors held at once (torch's allocator), and the most it had reserved from the
device. CPU: the most physical memory the process held (VmHWM of /proc/self/status), Python and its libraries included.
Linux can reset that mark; elsewhere the peak of the whole process so far stands in for it.

The tensors. That is what a memory plan foretells. On CUDA it is the same number. A CPU's allocator keeps no such mark,
so torch's profiler writes down what is allocated and freed during one update.
"""

import os
import re
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sltrain.events import Event

T = TypeVar("T")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


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


def tensor_peak(run: Callable[[], T], held_bytes: int, device: torch.device) -> tuple[T, int]:
    """What `run` returns, and the most bytes that tensors held while it ran.

    `held_bytes` is what they hold before, as `bytes_of` counts it; on CUDA the allocator knows.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it tells stderr that it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True, acc_events=False) as profile:
        result = run()
    present = highest = held_bytes
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            present += event.nbytes()
            highest = max(highest, present)
    return result, highest


@dataclass
class RunMemory:
    """A run's memory as it was planned, beside what it turns out to be."""

    process: PeakMemory
    planned_bytes: int | None  # of tensors, at their peak; None where that is unknown
    tensor_bytes: int | None = None  # that peak in one update, once it is measured

    def measure(self, run: Callable[[], T], held_bytes: int, device: torch.device) -> T:
        """What `run`, an update, returns; see `tensor_peak`."""
        result, self.tensor_bytes = tensor_peak(run, held_bytes, device)
        return result

    def numbers(self, gather: Callable[[tuple[int, ...]], list[tuple[int, ...]]]) -> Event:
        """What a metrics line says. Peaks are of the rank with the highest: of the process, of its tensors, and on CUDA
        what the allocator had reserved for them; `gather` gives the values of all ranks."""
        peak, reserved = self.process.peak_bytes(), self.process.reserved_bytes()
        tensors = self.tensor_bytes if reserved is None else peak
        peaks = [max(values) for values in zip(*gather((peak, tensors or 0, reserved or 0)), strict=True)]
        numbers: Event = {}
        if self.planned_bytes:
            numbers["planned_memory_bytes"] = self.planned_bytes
        numbers["peak_memory_bytes"] = peaks[0]
        if peaks[1]:
            numbers["peak_tensor_bytes"] = peaks[1]
        if peaks[2]:
            numbers["peak_memory_reserved_bytes"] = peaks[2]
        return numbers


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors, which may share it."""
    storages = (plain.untyped_storage() for tensor in tensors for plain in _plain(tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that one of a subclass, such as a quantized one, is made of; an ordinary one itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and optimizer state: what is held between updates."""
    state = (value for values in optimizer.state.values() for value in values.values())
    return bytes_of([*model.parameters(), *model.buffers(), *(t for t in state if isinstance(t, Tensor))])


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken: of the GPU, or of the machine and the container; None where the system does not
    say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    of_machine = int(available[1]) * 1024 if available else None
    limits = [number for number in (of_machine, _free_in_container()) if number is not None]
    return min(limits, default=None)


def _free_in_container() -> int | None:
    """What a container or a batch system leaves this process, by cgroup v2; None without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    if not limit.isdecimal():  # "max"
        return None
    return max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out. Torch's CUDA allocator has a type for it, its CPU allocator, the
    driver and cuBLAS have sentences."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
