"""The machine that numbers come from."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    is_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_bytes": memory_bytes(device),
    }


def memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line(machine: dict[str, Any]) -> str:
    """The same for people."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cpu_threads']} threads"
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    return f"{where}, {machine['memory_bytes'] / 1e9:.0f} GB; {machine['dtype']}; torch {machine['torch']}{cuda}"
