"""Layers that start from a dense matrix, against NumPy's singular value decomposition (Eckart and Young: no matrix of
the rank is nearer)."""

import numpy as np
import pytest
import torch

from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.support import KINDS

SHAPES = [(24, 40), (40, 24)]  # (out, in)


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def truncated(weight: torch.Tensor, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_low_rank_is_the_nearest_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    weight, bias = matrix(shape), torch.randn(shape[0])
    layer = LowRankLinear.from_dense(weight, bias=bias, rank=6, alpha=15)
    np.testing.assert_allclose(layer.dense_weight().numpy(), truncated(weight, 6), atol=3e-5)
    sizes = [torch.linalg.svdvals(factor.detach()) for factor in (layer.A, layer.B)]
    torch.testing.assert_close(*sizes)  # shared evenly
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().t() + bias)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("support", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sltrain_is_exact_on_its_support_and_the_nearest_of_its_rank_elsewhere(
    shape: tuple[int, int], support: str, rank: int
) -> None:
    weight, settings = matrix(shape), {"rank": rank, "alpha": 15, "sparsity": 0.15, "support": support}
    layer = SLTrainLinear.from_dense(weight, torch.Generator().manual_seed(1), **settings)
    found, near = layer.dense_weight(), torch.from_numpy(truncated(weight, rank)).float()
    trained = torch.zeros(weight.numel(), dtype=torch.bool)
    trained[layer.support.positions(layer.indices).long()] = True
    trained = trained.view(shape)
    assert 0.05 < trained.float().mean() < 0.3
    torch.testing.assert_close(found[trained], weight[trained], atol=3e-5, rtol=0)
    torch.testing.assert_close(found[~trained], near[~trained], atol=3e-5, rtol=0)
    drawn = SLTrainLinear(shape[1], shape[0], generator=torch.Generator().manual_seed(1), **settings)
    assert torch.equal(layer.indices, drawn.indices), "the support is the one that the seed gives"


def test_in_bfloat16_the_sparse_part_makes_up_for_the_rounding_of_the_factors() -> None:
    weight = matrix(SHAPES[0]).bfloat16()
    layer = SLTrainLinear.from_dense(weight, rank=6, alpha=15, sparsity=0.15)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    places = layer.support.positions(layer.indices).long()
    exact = (layer.B.float() @ layer.A.float() * layer.scale).view(-1)[places] + layer.values.float()
    torch.testing.assert_close(exact, weight.float().view(-1)[places], atol=1e-2, rtol=1e-2)
