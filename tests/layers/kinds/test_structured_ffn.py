"""The layer of method=structured_ffn: its start, its guide, and what it makes of a dense matrix."""

import pytest
import torch
from torch import nn

from sltrain.layers import LAYERS
from sltrain.layers.blocks import STRUCTURES
from sltrain.layers.kinds.structured_ffn import StructuredLinear


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(structure: str, has_guide: bool = False, **options: object) -> StructuredLinear:
    return StructuredLinear(24, 36, structure, 12, 4, has_guide, generator=generator(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward_is_the_dense_weight_and_all_is_trained(structure: str, share: float | None, bias: bool) -> None:
    layer = make(structure, share is not None, bias=bias, dtype=torch.float64)
    if share is not None:
        layer.guide.data.normal_(generator=generator(1))
        layer.share.fill_(share)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    assert layer.multiply_adds() - layer.num_trained == (0 if share is None else 24 * 36)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_guide_begins_as_the_product_and_ends_without_a_trace(structure: str) -> None:
    layer, x = make(structure), torch.randn(5, 24, generator=generator(1))
    before, names = layer(x), layer.state_dict().keys()
    layer.add_guide()
    for share in (1.0, 0.4):
        layer.start_guide(share)
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    layer.guide.data.normal_()
    assert not torch.allclose(layer(x), before)
    layer.share.fill_(0.0)
    assert torch.equal(layer(x), before)
    layer.drop_guide()
    assert torch.equal(layer(x), before) and layer.state_dict().keys() == names


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_matrix_of_the_structure_is_found_again(structure: str) -> None:
    source = make(structure, dtype=torch.float64)
    for parameter in source.parameters():
        parameter.data.normal_(generator=generator(2))
    settings = {key: value for key, value in source.settings().items() if key != "has_guide"}
    found = StructuredLinear.from_dense(source.dense_weight(), **settings)
    torch.testing.assert_close(found.dense_weight(), source.dense_weight(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_structure_is_as_near_as_it_can_be_and_a_guide_is_the_matrix(structure: str) -> None:
    """At the nearest matrix of a set of products the distance is stationary in both factors."""
    weight = torch.randn(36, 24, generator=generator(3), dtype=torch.float64)
    layer = StructuredLinear.from_dense(weight, structure=structure, rank=12, blocks=4, has_guide=True)
    assert torch.equal(layer.guide, weight)
    with torch.enable_grad():
        A, B = (factor.detach().requires_grad_() for factor in (layer.A, layer.B))
        dense = layer.structure.apply(torch.eye(24, dtype=torch.float64), A, B).t()
        distance = (dense - weight).square().sum()
        distance.backward()
    assert 0.05 < distance / weight.square().sum() < 0.9
    assert A.grad is not None and B.grad is not None
    assert max(A.grad.abs().max(), B.grad.abs().max()) < 1e-4


def test_starts() -> None:
    low_rank = StructuredLinear(96, 240, "low_rank", 96, 1, generator=generator(), init_std=0.3, gain=0.5)
    assert low_rank.dense_weight().std().item() == pytest.approx(0.15, rel=0.05)
    for structure in ("block_dense", "block_shuffle"):
        values = torch.linalg.svdvals(make(structure, gain=0.5).dense_weight())
        rank = 12 if structure == "block_dense" else 24
        torch.testing.assert_close(values[:rank], torch.full((rank,), 0.5), atol=1e-5, rtol=0)


def test_its_words_and_its_kind() -> None:
    words = "in_features=24, out_features=36, structure=block_dense, rank=12, blocks=4, has_guide=False, bias=False"
    assert repr(make("block_dense")) == f"StructuredLinear({words})"
    assert LAYERS.load("structured_ffn") is StructuredLinear
