"""Norms and singular values of parts against NumPy's of the dense matrices and against planted ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sltrain.layers import DensePart, LowRankLinear, LowRankPart, SLTrainLinear
from sltrain.layers.parts import singular_values


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_values(values: list[float], out: int, inner: int) -> Tensor:
    """A matrix (out, inner) with these singular values, the others 0."""
    left, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator(), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inner, len(values), generator=generator(), dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.t()


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(0, 12), sparsity=st.sampled_from([0.01, 0.2, 0.9]), seed=st.integers(0, 1000))
def test_parts_are_those_of_the_dense_weight(rank: int, sparsity: float, seed: int) -> None:
    layer = SLTrainLinear(20, 12, rank, sparsity, alpha=5, generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_(generator=generator(seed))
        product = layer.scale * layer.B @ layer.A
    parts = layer.parts()
    assert list(parts) == (["BA"] if rank else []) + ["S"]
    expected = {"BA": product, "S": layer.dense_weight() - product}
    for name, part in parts.items():
        torch.testing.assert_close(part.dense(), expected[name].detach())
        assert part.norm().dtype == torch.float32 and part.norm().shape == () and not part.norm().requires_grad
        assert part.norm().item() == pytest.approx(expected[name].norm().item(), rel=1e-4, abs=1e-6)
        values = np.linalg.svd(expected[name].detach().numpy(), compute_uv=False)
        found = part.singular_values().tolist()
        assert len(found) == (rank if name == "BA" else 12)
        np.testing.assert_allclose(found, values[: len(found)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))  # without the clamp rounding gives a negative square for some of them
def test_the_norm_of_cancelling_factors_is_not_nan(seed: int) -> None:
    layer = LowRankLinear(64, 64, 2, alpha=2, generator=generator(seed))
    with torch.no_grad():
        layer.A[1] = -layer.A[0]
        layer.B[:, 1] = layer.B[:, 0] * (1 + 1e-7)
    assert layer.parts()["BA"].norm().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_numpys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=generator()).to(dtype)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(DensePart(matrix).singular_values().numpy(), expected, rtol=1e-12)
    assert DensePart(matrix).norm().item() == pytest.approx(np.linalg.norm(matrix.double().numpy()))


@pytest.mark.parametrize(("out", "rank", "inner"), [(9, 3, 14), (14, 3, 9), (9, 9, 14), (6, 1, 6), (6, 0, 4)])
def test_a_product_has_the_values_of_the_dense_matrix(out: int, rank: int, inner: int) -> None:
    B, A = torch.randn(out, rank, generator=generator()), torch.randn(rank, inner, generator=generator())
    dense = np.linalg.svd(2.5 * B.double().numpy() @ A.double().numpy(), compute_uv=False)
    part = LowRankPart(B, A, 2.5)
    assert len(part.singular_values()) == rank == part.rank
    np.testing.assert_allclose(part.singular_values().numpy(), dense[:rank], rtol=1e-11)


def test_noise_of_rounding_is_zero() -> None:
    matrix = with_values([5.0, 2.0, 1e-6], 20, 30)
    assert singular_values(matrix)[:3].tolist() == pytest.approx([5, 2, 1e-6], rel=1e-8)
    assert singular_values(matrix)[3:].tolist() == [0.0] * 17
    values = LowRankPart(torch.ones(20, 4), torch.ones(4, 30)).singular_values()  # rank 1
    assert values.tolist() == pytest.approx([math.sqrt(20 * 30) * 4, 0, 0, 0])
    assert values[1:].count_nonzero() == 0
    assert singular_values(torch.zeros(3, 4)).tolist() == [0, 0, 0]


def test_planted_low_rank_and_sparse_parts_are_found_again() -> None:
    """L in the upper left corner and a diagonal S elsewhere do not touch: the values of W are those of both."""
    B, A = torch.zeros(30, 3), torch.zeros(3, 40)
    B[:10] = with_values([9.0, 8.0, 7.0], 10, 3).float()
    A[:, :10] = torch.linalg.qr(torch.randn(10, 3, generator=generator())).Q.t()
    S = torch.zeros(30, 40)
    S[range(10, 30), range(10, 30)] = torch.linspace(0.1, 0.5, 20)
    assert LowRankPart(B, A).singular_values().tolist() == pytest.approx([9, 8, 7], rel=1e-5)
    tail = sorted(torch.linspace(0.1, 0.5, 20).tolist(), reverse=True)
    assert singular_values(B @ A + S)[:23].tolist() == pytest.approx([9, 8, 7, *tail], rel=1e-5)
    assert singular_values(S).count_nonzero() == 20
