"""The choice between the two paths: by shape and device alone, unless a user or a saved run fixes it."""

import pytest
import torch
from torch import nn

from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.cost import COSTS, choose_path, composed_cost, factored_cost, machine_kind, set_paths


@pytest.mark.parametrize(
    ("machine", "num_rows", "price", "path"),
    [
        ("cpu", 2048, "entry", "factored"),
        ("cpu", 64, "entry", "factored"),
        ("cpu without kernel", 65536, "entry", "composed"),
        ("cpu without kernel", 2048, "column_entry", "factored"),
        ("cuda", 65536, "entry", "composed"),  # a dense S and the factors cost more than W
        ("cuda", 256, "entry", "factored"),  # few rows do not pay for building W
        ("cuda", 65536, "block_entry", "factored"),
        ("cuda", 65536, "column_entry", "factored"),
    ],
)
def test_the_cheaper_path_of_a_1b_projection(machine, num_rows, price, path):
    assert choose_path(num_rows, 2048, 2048, 512, 125829, price, machine) == path


def test_costs_count_what_the_products_do():
    """With everything but products free: 3 N in out + 4 r in out, and 3 N r (in + out) + 3 N nnz."""
    free = type(COSTS["cpu"])(entry=1.0, block_entry=1.0, column_entry=1.0, weight_pass=0.0)
    assert composed_cost(10, 30, 20, 4, free) == 3 * 10 * 30 * 20 + 4 * 4 * 30 * 20
    assert factored_cost(10, 30, 20, 4, 18, "entry", free) == 3 * 10 * 4 * (30 + 20) + 3 * 10 * 18
    dense = type(free)(entry=None, block_entry=1.0, column_entry=1.0, weight_pass=0.0)
    assert factored_cost(10, 30, 20, 4, 18, "entry", dense) == 3 * 10 * 4 * (30 + 20) + 3 * 10 * 30 * 20
    assert factored_cost(10, 30, 20, 4, 0, "entry", dense) == 3 * 10 * 4 * (30 + 20)


def test_composed_counts_its_passes_over_a_dense_w():
    """Counted by hand from functional.py: B A written, then read and changed by S, in forward and in backward; dW
    written and read."""
    priced = type(COSTS["cpu"])(entry=1.0, block_entry=1.0, column_entry=1.0, weight_pass=10.0)
    written_read_changed = 3
    passes = 2 * written_read_changed + 2
    assert composed_cost(10, 30, 20, 4, priced) == (3 * 10 + 4 * 4 + passes * 10.0) * 30 * 20
    dense = type(priced)(entry=None, block_entry=1.0, column_entry=1.0, weight_pass=10.0)
    assert factored_cost(10, 30, 20, 0, 18, "entry", dense) == 3 * (10 + 10.0) * 30 * 20


def test_a_rank_that_saves_nothing_is_composed():
    assert choose_path(2048, 64, 64, 64, 122, "entry", "cpu") == "composed"


def make_model():
    return nn.Sequential(
        SLTrainLinear(64, 64, 4, 0.1, 8), nn.ReLU(), SLTrainLinear(64, 64, 60, 0.1, 8), nn.Linear(64, 8)
    )


def test_paths_are_set_by_name_and_the_same_every_time():
    model = make_model()
    chosen = set_paths(model, "auto", 4096, torch.device("cpu"))
    assert chosen == {"0": model[0].path, "2": model[2].path}
    assert chosen["2"] == "composed"
    assert set_paths(make_model(), "auto", 4096, torch.device("cpu")) == chosen


@pytest.mark.parametrize("typed", ["composed", "factored"])
def test_what_is_typed_wins_over_what_was_saved_and_that_over_the_costs(typed):
    saved = {"0": "composed", "2": "factored"}
    assert set_paths(make_model(), "auto", 4096, torch.device("cpu"), saved) == saved
    assert set_paths(make_model(), typed, 4096, torch.device("cpu"), saved) == {"0": typed, "2": typed}


def test_only_layers_with_several_paths_get_one():
    model = nn.Sequential(SLTrainLinear(64, 64, 4, 0.1, 8), LowRankLinear(64, 64, 4, 8), nn.Linear(64, 8))
    assert set_paths(model, "factored", 16, torch.device("cpu")) == {"0": "factored"}
    assert "path" not in repr(model[1])


def test_the_kernel_is_for_float32_on_the_cpu():
    assert machine_kind(torch.device("cpu"), torch.float64) == "cpu without kernel"
    assert machine_kind(torch.device("cuda"), torch.bfloat16) == "cuda"
