"""A price is solved from the time of a probe in units of the dense product."""

import time

import pytest
import torch
from torch import nn

from sltrain.benchmarks.calibrate import MEDIAN, Probe, measure_prices, price_table


def test_what_is_known_comes_off_before_the_price() -> None:
    layer = nn.Linear(32, 32, bias=False)
    unit = 16 * 32 * 32  # multiply-adds of the dense product
    probes = [
        Probe("layer", 3.0, layer, 32, 32, num_rows=16, known=0, count=unit),
        Probe("rest", None, layer, 32, 32, num_rows=16, known=unit, count=unit),
    ]
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "repeats": 3, "deadline": time.monotonic()}
    rows = measure_prices(probes, 16, say=lambda line: None, **settings)
    measured = {(row["measured"], row["shape"]): row for row in rows}
    layer_row, rest_row = measured["layer", "32x32"], measured["rest", "32x32"]
    product_seconds = layer_row["seconds"] / layer_row["price"]
    assert product_seconds > 0
    assert rest_row["seconds"] / product_seconds == pytest.approx(rest_row["price"] + 1)
    assert measured["layer", MEDIAN]["price"] == layer_row["price"]
    assert measured["layer", MEDIAN]["used"] == 3.0 and measured["rest", MEDIAN]["used"] is None
    assert "layer" in price_table(rows) and "32x32" in price_table(rows)
