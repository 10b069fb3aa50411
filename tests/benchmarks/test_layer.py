"""Floors count the arithmetic that torch counts, and any layer kind can be a candidate."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sltrain.benchmarks.base import Bench
from sltrain.benchmarks.layer import MEAN, build_layer, make_layer, measure_layer
from sltrain.layers.base import LAYERS, ReplacedLinear
from sltrain.planning.flops import linear_multiply_adds

ARGUMENTS = ["what=layer", "shapes=[[24,16,4],[16,40,8]]", "tokens=8", "repeats=2", "device=cpu", "sparsity=0.1"]


@pytest.fixture
def halved() -> Iterator[None]:
    """A layer kind that no file knows: y from the first half of x, in two ways."""

    class Halved(ReplacedLinear, kind="halved"):
        PATHS = ("split", "padded")

        def __init__(self, in_features: int, out_features: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__(in_features, out_features)
            self.weight = nn.Parameter(torch.zeros(out_features, in_features // 2, device=device, dtype=dtype))
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return x[..., : self.in_features // 2] @ self.weight.t()

        def multiply_adds(self) -> int:
            return self.weight.numel()

    yield
    LAYERS._classes.pop("halved")


@pytest.mark.usefixtures("halved")
def test_a_kind_that_this_package_has_never_heard_of_is_a_candidate(bench: Callable[..., Bench]) -> None:
    rows = measure_layer(bench(*ARGUMENTS, "candidates=[dense,halved,halved_padded]"))[0]
    halved = {row["shape"]: row for row in rows if row["measured"] == "halved_padded"}
    assert halved["24x16 r4"]["path"] == "padded"
    assert halved["24x16 r4"]["parameter_bytes"] == 24 * 8 * 4
    dense = {row["shape"]: row for row in rows if row["measured"] == "dense"}
    for shape, row in halved.items():
        assert row["floor_seconds"] == pytest.approx(dense[shape]["floor_seconds"] / 2)
    layer = make_layer(bench(*ARGUMENTS), "halved", [24, 16, 4])
    assert layer.weight.all(), "nothing is timed on zeros"


@pytest.mark.parametrize("name", ["dense", "low_rank"])
def test_the_floor_counts_what_torch_counts(name: str, bench: Callable[..., Bench]) -> None:
    layer = make_layer(bench(*ARGUMENTS), name, [16, 24, 4])
    x = torch.randn(10, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).backward(torch.ones(10, 16))
    assert 2 * 3 * 10 * linear_multiply_adds(layer) == counter.get_total_flops()


@pytest.mark.parametrize(
    "name", ["uniform", "stratified", "block", "column", "rolled", "uniform_composed", "published"]
)
def test_an_entry_of_s_is_a_multiply_add_however_it_is_computed(name: str, bench: Callable[..., Bench]) -> None:
    layer = make_layer(bench(*ARGUMENTS), name, [16, 24, 4])
    assert linear_multiply_adds(layer) == 4 * (16 + 24) + layer.values.numel()
    assert layer.values.numel() == pytest.approx(0.1 * 16 * 24, rel=0.3)


def test_rows_compare_with_dense_and_means_are_geometric(bench: Callable[..., Bench]) -> None:
    rows = measure_layer(bench(*ARGUMENTS, "candidates=[dense,uniform_factored,low_rank]"))[0]
    by_name = {(row["measured"], row["shape"]): row for row in rows}
    ratios = []
    for shape in ("24x16 r4", "16x40 r8"):
        dense, sparse = by_name["dense", shape], by_name["uniform_factored", shape]
        ratios.append(sparse["seconds"] / dense["seconds"])
        assert (dense["ratio_to_dense"], sparse["ratio_to_dense"]) == (1, pytest.approx(ratios[-1]))
        assert sparse["floor_ratio_to_dense"] == pytest.approx(sparse["floor_seconds"] / dense["seconds"])
        assert sparse["path"] == "factored" and dense["path"] is None
    mean = by_name["uniform_factored", MEAN]
    assert mean["ratio_to_dense"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))


def test_the_table_shows_the_rows(bench: Callable[..., Bench]) -> None:
    rows, text = measure_layer(bench(*ARGUMENTS, "candidates=[dense,published,low_rank]"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    titles = lines[0]
    for line in lines[2:5]:
        cells = dict(zip(titles, line, strict=True))
        for row in rows:
            if row["shape"] == line[0] and row["measured"] != "dense":
                assert cells[row["measured"]] == f"{row['ratio_to_dense']:.2f}"
    assert [line[0] for line in lines[2:5]] == ["24x16 r4", "16x40 r8", MEAN]


def test_without_dense_there_is_no_ratio(bench: Callable[..., Bench]) -> None:
    rows, text = measure_layer(bench(*ARGUMENTS, "candidates=[low_rank]"))
    assert {row["ratio_to_dense"] for row in rows} == {None}
    for row in rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['shape']}")]
        assert f" {1e3 * row['seconds']:,.1f} ms |" in line


def test_a_kind_that_cannot_be_made_is_one_line(bench: Callable[..., Bench]) -> None:
    with pytest.raises(ValueError, match="sltrain, 16x24: .*rank"):
        build_layer(bench(*ARGUMENTS), "sltrain", [16, 24, 17], {})
