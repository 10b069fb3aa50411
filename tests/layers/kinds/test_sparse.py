"""The layer of method=sparse: its start, masks and refusals."""

import pytest
import torch
from torch import nn

from sltrain.layers import LAYERS
from sltrain.layers.kinds.sparse import SparseLinear
from sltrain.layers.masked import unpack


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(layer: SparseLinear) -> torch.Tensor:
    return unpack(layer.mask, layer.in_features)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (7, 24), (24, 24)])
def test_forward_is_the_dense_weight_and_all_is_trained(keep: int, of: int, bias: bool) -> None:
    layer = SparseLinear(24, 16, keep, of, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    assert layer.num_trained == layer.multiply_adds() == 24 * 16 * keep // of


@pytest.mark.parametrize("prune", ["random", "magnitude"])
def test_every_group_of_a_row_keeps_exactly_n(prune: str) -> None:
    layer = SparseLinear(64, 48, 2, 4, generator=generator(), prune=prune)
    assert (mask_of(layer).view(48, 16, 4).sum(2) == 2).all()
    assert (layer.dense_weight() != 0).sum() == 48 * 32


def test_random_masks_prefer_no_place() -> None:
    """Of 400 rows each place is kept by half, within four standard deviations."""
    shares = mask_of(SparseLinear(32, 400, 16, 32, generator=generator())).float().mean(0)
    assert (shares - 0.5).abs().max() < 4 * 0.5 / 400**0.5 and shares.std() > 0


@pytest.mark.parametrize("prune", ["random", "magnitude"])
def test_the_start_is_that_of_a_dense_layer_at_the_kept_places(prune: str) -> None:
    layer = SparseLinear(64, 48, 2, 4, generator=generator(), init_std=0.3, prune=prune)
    dense = torch.empty(48 * 64).normal_(0, 0.3, generator=generator()).view(48, 64)
    assert torch.equal(layer.dense_weight(), dense * mask_of(layer))
    dropped = dense.abs().masked_fill(mask_of(layer), -1).view(48, 16, 4).amax(2)
    kept = layer.dense_weight().abs().masked_fill(~mask_of(layer), 9).view(48, 16, 4).amin(2)
    assert bool((kept >= dropped).all()) == (prune == "magnitude")


def test_a_dense_matrix_is_pruned_by_magnitude_or_at_the_drawn_places() -> None:
    weight = torch.randn(12, 20, generator=generator(1))
    by_size = SparseLinear.from_dense(weight, keep=5, of=20, prune="magnitude")
    limit = weight.abs().sort(descending=True).values[:, 4:5]
    assert torch.equal(by_size.dense_weight(), weight * (weight.abs() >= limit))
    random = SparseLinear.from_dense(weight, generator(2), keep=5, of=20)
    drawn = SparseLinear(20, 12, 5, 20, generator=generator(2))
    assert torch.equal(random.mask, drawn.mask)
    assert torch.equal(random.dense_weight(), weight * mask_of(drawn))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of random, magnitude"):
        SparseLinear(40, 30, 2, 4, prune="size")
    with pytest.raises(ValueError, match="cannot keep 5 of every 4 entries of a row of 40"):
        SparseLinear(40, 30, 5, 4)


def test_its_words_and_its_kind() -> None:
    layer = SparseLinear(40, 30, 2, 4, bias=True)
    assert repr(layer) == "SparseLinear(in_features=40, out_features=30, keep=2, of=4, bias=True)"
    assert LAYERS.load("sparse") is SparseLinear
    assert layer.mask.numel() == 30 * 5 and layer.values.shape == (30, 20)
