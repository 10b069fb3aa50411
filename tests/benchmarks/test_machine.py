"""The machine is named by what numbers depend on."""

import platform
from pathlib import Path

import pytest
import torch

from sltrain.benchmarks.machine import cpu_name, describe_machine, machine_line, memory_bytes

CPU = torch.device("cpu")


def test_the_line_names_processor_threads_and_torch() -> None:
    machine = describe_machine(CPU, torch.bfloat16)
    line = machine_line(machine)
    for word in (cpu_name(), f"{torch.get_num_threads()} threads", "bfloat16", torch.__version__):
        assert word in line
    assert machine["gpu"] is None and machine["cuda"] is None


@pytest.mark.skipif(platform.system() != "Linux", reason="read from /proc")
def test_memory_is_what_the_kernel_says() -> None:
    first = Path("/proc/meminfo").read_text().splitlines()[0].split()
    assert first[0] == "MemTotal:"
    assert memory_bytes(CPU) == pytest.approx(int(first[1]) * 1024, rel=0.02)
