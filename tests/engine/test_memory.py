"""The peak rises with what was held, outlives its release, and a reset forgets it."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from sltrain.engine import memory
from sltrain.engine.memory import PeakMemory

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the mark")
def test_cpu_peak_sees_a_released_block_until_reset() -> None:
    peak = PeakMemory(torch.device("cpu"))
    assert peak.measure == "peak resident size" and peak.reserved_bytes() is None
    before = peak.peak_bytes()
    block = bytearray(b"x") * (200 * MIB)
    held = len(block)
    del block
    after = peak.peak_bytes()
    assert 0.8 * held < after - before < 1.5 * held
    peak.reset()
    assert peak.peak_bytes() < after - 0.5 * held


def test_falls_back_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no folder" / "none")
    expected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert PeakMemory(torch.device("cpu")).peak_bytes() >= expected * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert PeakMemory(torch.device("cpu")).peak_bytes() < 2 * expected + 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_peak() -> None:
    device = torch.device("cuda")
    peak = PeakMemory(device)
    start = peak.peak_bytes()
    block = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    del block
    reserved = peak.reserved_bytes()
    assert peak.measure == "cuda max_memory_allocated" and reserved is not None
    assert peak.peak_bytes() - start == 64 * MIB and reserved >= peak.peak_bytes()
    peak.reset()
    assert peak.peak_bytes() == start
