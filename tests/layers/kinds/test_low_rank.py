"""The low-rank baseline: its function, start, drawing and refusals."""

import math

import pytest
import torch
from torch import nn

from sltrain.layers import LAYERS, LowRankLinear, base


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_weight(bias: bool) -> None:
    layer = LowRankLinear(24, 16, 4, alpha=8, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [101, 1009, 10**6])  # primes: no piece ends where a row does
def test_drawing_in_pieces_changes_no_number(at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "DRAWN_AT_ONCE", at_once)
    layer = LowRankLinear(97, 53, 11, alpha=11, bias=True, generator=generator(), dtype=dtype)
    source, bound = generator(), 1 / math.sqrt(97)
    for tensor, b in ((layer.A, bound), (layer.B, math.sqrt(3 / 11)), (layer.bias, bound)):
        assert tensor is not None
        assert torch.equal(tensor, torch.empty(tensor.shape).uniform_(-b, b, generator=source).to(dtype))


def test_its_words_and_its_kind() -> None:
    layer = LowRankLinear(40, 30, 4, 8, bias=True)
    assert repr(layer) == "LowRankLinear(in_features=40, out_features=30, rank=4, alpha=8, bias=True)"
    assert LAYERS.load("low_rank") is LowRankLinear and layer.kind == "low_rank"
    assert layer.num_trained == 4 * (40 + 30) and layer.multiply_adds() == 4 * (40 + 30)


def test_a_low_rank_layer_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="rank of at least 1"):
        LowRankLinear(40, 30, 0, 8)
