"""Memory of the training process: the peak of the process, the peak of its tensors, and what is free.

The process. CUDA: the most bytes that tensors held at once (torch's allocator), and the most it reserved from the
device. CPU: the most physical memory the process held (VmHWM of /proc/self/status), Python and its libraries included.
Linux can reset that mark; elsewhere the peak of the whole process so far is reported.

The tensors. This is the number a memory plan predicts. On CUDA it is the allocator's. A CPU's allocator has no such
mark, so torch's profiler records what is allocated and freed during one update of each phase.
"""

import contextlib
import logging
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType

from sltrain.engine.actions import Action
from sltrain.engine.ema import Average
from sltrain.engine.strategy import Strategy
from sltrain.events import Event
from sltrain.log import memory_size

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

MEASURED_UPDATE = 3  # of a process, or phase: the first creates the optimizer's state, the second DDP's final buckets
MAX_PROFILED_MICRO_BATCHES = 4  # of the measured update: each produces tens of thousands of records


class PeakMemory:
    """Peak memory on `device` since construction: a sweep job does not report the peak of an earlier one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._highest = 0
        self.measure = "cuda max_memory_allocated" if self._is_cuda else "peak resident size"
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak remains that of the whole process
            _CLEAR_REFS.write_text("5")  # man 5 proc: sets VmHWM back to the present size

    def peak_bytes(self) -> int:
        """The peak, in bytes."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        if (mark := _kilobytes(_STATUS, "VmHWM")) is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            mark = peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, all others KiB
        self._highest = max(mark, self._highest)  # Linux counts pages per core: a later mark may be a few pages lower
        return self._highest

    def reserved_bytes(self) -> int | None:
        """The most bytes that torch's allocator reserved from the GPU; None on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self._is_cuda else None


def _kilobytes(path: Path, key: str) -> int | None:
    """The entry `key: N kB` of a file of /proc, in bytes; None if the system has none."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def tensor_peak(run: Callable[[], T], held_bytes: int, device: torch.device) -> tuple[T, int]:
    """The result of `run`, and the most bytes that tensors held while it ran. `held_bytes` is what they held before, as
    `bytes_of` counts it; CUDA's allocator knows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to stderr when it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True, acc_events=False) as profile:
        result = run()
    return result, held_bytes + _highest_net(profile.kineto_results.experimental_event_tree())


def _highest_net(events: Iterable[Any]) -> int:
    """The most bytes that blocks allocated during a profile held at once. A block that was there before does not count
    when it is freed: its size is not known, or is that of an older block at its address, seen by an earlier profile."""
    changes, left = [], list(events)
    while left:
        event = left.pop()
        left.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    present = highest = 0
    own = set()
    for _, address, size in sorted(changes):
        if size > 0:
            own.add(address)
        elif address not in own:
            continue
        else:
            own.remove(address)
        present += size
        highest = max(highest, present)
    return highest


@dataclass
class RunMemory:
    """A run's memory: as planned, and as measured."""

    process: PeakMemory
    planned_bytes: int | None  # peak of its tensors; None if unknown
    tensor_bytes: int | None = None  # the highest peak of those that were measured
    num_updates: int = 0  # of this process, or since a phase began

    def measure(self, update: Callable[[], T], held_bytes: Callable[[], int], num_micro_batches: int) -> T:
        """The result of `update`. On a CPU one update of the process, and one of each phase, is measured, see
        `tensor_peak`; on CUDA the allocator's peak is always available."""
        self.num_updates += 1
        is_due = self.num_updates == MEASURED_UPDATE and num_micro_batches <= MAX_PROFILED_MICRO_BATCHES
        if not is_due or self.process.device.type == "cuda":
            return update()
        result, peak = tensor_peak(update, held_bytes(), self.process.device)
        self.tensor_bytes = max(peak, self.tensor_bytes or 0)
        planned = "" if self.planned_bytes is None else f", {memory_size(self.planned_bytes)} planned"
        logger.info(f"memory     {memory_size(peak)} measured for tensors{planned}")
        return result

    def numbers(self, gather: Callable[[tuple[int, ...]], list[tuple[int, ...]]]) -> Event:
        """The memory numbers of a metrics line: planned, and the peaks of the process, of its tensors, and on CUDA of
        what the allocator reserved, each of the rank with the highest; `gather` collects the values of all ranks."""
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
    """Bytes of the memory of these tensors; what they share counts once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Strategy | None = None) -> int:
    """Bytes of weights, buffers and optimizer state: what is held between updates. A strategy says what this process
    holds of a weight; None: all."""
    weights = [p if strategy is None else strategy.part(p.detach())[0] for p in model.parameters()]
    state = (value for values in optimizer.state.values() for value in values.values())
    return bytes_of([*weights, *model.buffers(), *(t for t in state if isinstance(t, Tensor))])


def averages_bytes(actions: Iterable[Action]) -> int:
    """Bytes of averaged weights, which are held between updates too."""
    return sum(bytes_of(action.state.values.values()) for action in actions if isinstance(action.state, Average))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the GPU, or of the machine and the container; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.exists():
        return None
    limits = [_kilobytes(_MEMINFO, "MemAvailable"), _free_in_container()]
    return min((number for number in limits if number is not None), default=None)


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
    """Whether an exception means that memory ran out. Torch's CUDA allocator has a type for it; its CPU allocator, the
    driver and cuBLAS have messages."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
