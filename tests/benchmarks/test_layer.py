"""Floors count the arithmetic that torch counts, and what a layer keeps for backward is counted once."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sltrain.benchmarks.layer import MEAN, Case, layer_tables, measure_layers, saved_bytes


class LowRank(nn.Module):
    """B A in two plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(4, 24)), nn.Parameter(torch.randn(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.A.t()) @ self.B.t()


def counted_flops(module: nn.Module) -> int:
    x = torch.randn(10, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        module(x).backward(torch.ones(10, 16))
    return counter.get_total_flops()


def case(**candidates: nn.Module) -> Case:
    return Case(16, 24, rank=4, num_nonzero=0, candidates=candidates, paths={})


def test_floors_are_what_torch_counts() -> None:
    floors = case().floors(num_rows=10)
    assert 2 * floors["floor_dense"] == counted_flops(nn.Linear(24, 16, bias=False))
    assert 2 * floors["floor_factored"] == counted_flops(LowRank())
    sparse = Case(16, 24, rank=4, num_nonzero=7, candidates={}, paths={}).floors(num_rows=10)
    assert sparse["floor_factored"] - floors["floor_factored"] == 3 * 10 * 7


def test_saved_bytes_leave_out_x_and_parameters() -> None:
    x = torch.randn(10, 24, requires_grad=True)
    assert saved_bytes(nn.Linear(24, 16, bias=False), x) == 0
    assert saved_bytes(LowRank(), x) == 10 * 4 * 4  # x A^T, float32


def test_rows_and_tables() -> None:
    dense, low_rank = nn.Linear(24, 16, bias=False), LowRank()
    rows = measure_layers(
        [case(dense=dense, low_rank=low_rank, again=low_rank)],
        10,
        device=torch.device("cpu"),
        dtype=torch.float32,
        repeats=3,
        deadline=time.monotonic(),
        say=lambda line: None,
    )
    by_name = {row["measured"]: row for row in rows if row["shape"] != MEAN}
    assert by_name["dense"]["ratio_to_dense"] == 1
    assert by_name["dense"]["parameter_bytes"] == 16 * 24 * 4
    low = by_name["low_rank"]
    assert low["ratio_to_dense"] == pytest.approx(low["seconds"] / by_name["dense"]["seconds"])
    assert by_name["again"]["seconds"] == low["seconds"], "a module with two names is timed once"
    assert by_name["floor_dense"]["seconds"] == pytest.approx(3 * by_name["product"]["seconds"])
    means = {row["measured"]: row for row in rows if row["shape"] == MEAN}
    assert means["low_rank"]["ratio_to_dense"] == pytest.approx(low["ratio_to_dense"])
    text = layer_tables(rows)
    assert "16x24 r4" in text and "geometric mean" in text and "floor_composed" in text
