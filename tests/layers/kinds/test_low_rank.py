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
    layer = LowRankLinear(97, 53, 11, alpha=11, bias=True, generator=generator(), dtype=dtype, start="uniform")
    source, bound = generator(), 1 / math.sqrt(97)
    for tensor, b in ((layer.A, bound), (layer.B, math.sqrt(3 / 11)), (layer.bias, bound)):
        assert tensor is not None
        assert torch.equal(tensor, torch.empty(tensor.shape).uniform_(-b, b, generator=source).to(dtype))


@pytest.mark.parametrize("sides", [(96, 96), (240, 96), (96, 240)])
def test_the_spectral_start_is_nearest_to_a_dense_one(sides: tuple[int, int]) -> None:
    """Its singular values are those that random dense matrices have, its vectors are orthonormal on both sides."""
    out_features, in_features = sides
    dense = torch.stack([torch.linalg.svdvals(0.3 * torch.randn(*sides, generator=generator(i))) for i in range(20)])
    layer = LowRankLinear(in_features, out_features, 24, alpha=7, generator=generator(), init_std=0.3)
    values = torch.linalg.svdvals(layer.dense_weight())
    torch.testing.assert_close(values[:24], dense.mean(0)[:24], rtol=0.02, atol=0)
    assert values[24] < 1e-4 * values[0]
    for gram in (layer.A @ layer.A.t(), layer.B.t() @ layer.B):
        torch.testing.assert_close(gram, torch.diag(values[:24] / layer.scale), rtol=1e-4, atol=1e-4)


def test_a_layer_of_its_own_starts_near_nn_linear() -> None:
    layer, linear = LowRankLinear(200, 200, 200, alpha=3, generator=generator()), nn.Linear(200, 200)
    assert layer.dense_weight().std().item() == pytest.approx(linear.weight.std().item(), rel=0.05)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of spectral, uniform"):
        LowRankLinear(40, 30, 4, 8, start="zero")


def test_its_words_and_its_kind() -> None:
    layer = LowRankLinear(40, 30, 4, 8, bias=True)
    assert repr(layer) == "LowRankLinear(in_features=40, out_features=30, rank=4, alpha=8, bias=True)"
    assert LAYERS.load("low_rank") is LowRankLinear and layer.kind == "low_rank"
    assert layer.num_trained == 4 * (40 + 30) and layer.multiply_adds() == 4 * (40 + 30)


def test_a_low_rank_layer_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="rank of at least 1"):
        LowRankLinear(40, 30, 0, 8)
