"""The peak rises with what was held, outlives its release, and a new measurement forgets it."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sltrain.engine import memory
from sltrain.engine.memory import PeakMemory, bytes_of, free_bytes, held_by, is_out_of_memory, tensor_peak

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the mark")
def test_cpu_peak_sees_a_released_block_until_the_next_measurement() -> None:
    peak = PeakMemory(torch.device("cpu"))
    assert peak.measure == "peak resident size" and peak.reserved_bytes() is None
    before = peak.peak_bytes()
    block = bytearray(b"x") * (200 * MIB)
    held = len(block)
    del block
    after = peak.peak_bytes()
    assert 0.8 * held < after - before < 1.5 * held
    assert PeakMemory(torch.device("cpu")).peak_bytes() < after - 0.5 * held


def test_falls_back_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no folder" / "none")
    expected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert PeakMemory(torch.device("cpu")).peak_bytes() >= expected * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert PeakMemory(torch.device("cpu")).peak_bytes() < 2 * expected + 1024


def test_a_mark_that_falls_by_some_pages_does_not_lower_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(memory, "_STATUS", status)
    peak, seen = PeakMemory(torch.device("cpu")), []
    for kilobytes in (2000, 1844, 2001):
        status.write_text(f"VmHWM:\t{kilobytes} kB\n")
        seen.append(peak.peak_bytes())
    assert seen == [2000 * 1024, 2000 * 1024, 2001 * 1024]


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
    assert PeakMemory(device).peak_bytes() == start


CPU = torch.device("cpu")


def test_tensor_peak_is_the_most_that_was_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> str:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(4 * MIB, dtype=torch.uint8)
        del second, third
        return "done"

    assert tensor_peak(run, 10, CPU) == ("done", 10 + 6 * MIB)
    assert capfd.readouterr().err == ""  # the profiler is silent


def test_tensor_peak_sees_what_an_operation_takes_for_itself() -> None:
    """A product of a transposed copy: the result, and the copy that no Python code sees."""
    x = torch.randn(1000, 500)
    _, peak = tensor_peak(lambda: x.t().contiguous().sum(), 0, CPU)
    assert peak >= x.numel() * 4


def test_bytes_of_shared_storage_count_once() -> None:
    block = torch.zeros(100)
    assert bytes_of([block, block[:10], block.view(10, 10), torch.zeros(3, dtype=torch.uint8)]) == 403


def test_held_by_model_and_optimizer() -> None:
    model = nn.Linear(10, 20)
    model.register_buffer("indices", torch.zeros(7, dtype=torch.uint8))
    optimizer = torch.optim.AdamW(model.parameters())
    assert held_by(model, optimizer) == 4 * 220 + 7
    model(torch.ones(10)).sum().backward()
    optimizer.step()
    assert held_by(model, optimizer) == 3 * 4 * 220 + 7 + 2 * 4  # two moments, and a step count for each tensor


def test_free_memory_is_that_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/meminfo").exists():
        assert 0 < (free_bytes(CPU) or 0) < 2**50
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert free_bytes(CPU) is None


def test_only_errors_about_memory_are_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert is_out_of_memory(raised.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_block_that_an_earlier_profile_saw_is_not_missed_twice() -> None:
    """torch keeps its size by address, though it was freed outside a profile and another block may lie there."""
    held, _ = tensor_peak(lambda: [torch.empty(3 * MIB, dtype=torch.uint8)], 0, CPU)
    held[0] = torch.empty(1)
    held[0] = torch.empty(3 * MIB, dtype=torch.uint8)

    def run() -> torch.Tensor:
        held.clear()
        return torch.empty(2 * MIB, dtype=torch.uint8)

    assert tensor_peak(run, 3 * MIB, CPU)[1] == 5 * MIB
