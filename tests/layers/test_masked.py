"""Masks of N of every M neighbours: their bits, the matrices made from them, and products, against NumPy and plain
autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sltrain.layers import masked
from sltrain.layers.masked import MaskedPart, compose, gather, keep_largest, kept_per_row, masked_linear, pack, unpack


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_mask(out: int, columns: int, n: int, m: int) -> torch.Tensor:
    return keep_largest(drawn(out, columns, seed=1), n, m)


@pytest.mark.parametrize(("columns", "n", "m"), [(24, 2, 4), (24, 1, 8), (24, 5, 24), (21, 2, 4), (23, 3, 4)])
def test_each_group_keeps_its_largest(columns: int, n: int, m: int) -> None:
    scores = drawn(6, columns)
    mask = keep_largest(scores, n, m)
    for row, kept in zip(scores.numpy(), mask.numpy(), strict=True):
        for first in range(0, columns, m):
            group = row[first : first + m]
            largest = np.sort(group)[::-1][:n]
            assert set(group[kept[first : first + m]]) == set(largest)
    assert (mask.sum(1) == kept_per_row(columns, n, m)).all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 9)])
def test_a_group_that_a_row_cannot_have(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {n} of every {m} entries of a row of 8"):
        kept_per_row(8, n, m)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 24])
def test_bits_are_numpys(columns: int) -> None:
    mask = drawn(5, columns) > 0
    bits = pack(mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack(bits, columns), mask)


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_a_matrix_and_its_values_are_each_others(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are decoded at once."""
    rows = max(1, at_once // 21)
    slices = [slice(first, first + rows) for first in range(0, 10, rows)]
    monkeypatch.setattr(masked, "_pieces", lambda mask, in_features: slices)
    mask, dense = some_mask(10, 21, 2, 4), drawn(10, 21)
    values = gather(dense, pack(mask), kept_per_row(21, 2, 4))
    np.testing.assert_array_equal(values.flatten().numpy(), dense.numpy()[mask.numpy()])
    assert torch.equal(compose(values, pack(mask), 21), dense * mask)
    again = drawn(*values.shape, seed=2) > 0
    assert torch.equal(compose(values, pack(mask), 21, pack(again)), compose(values * again, pack(mask), 21))


def test_pieces_cover_all_rows() -> None:
    mask = torch.zeros(100, 1000, dtype=torch.uint8)
    covered = [row for piece in masked._pieces(mask, 8000) for row in range(100)[piece]]
    assert covered == list(range(100)) and len(list(masked._pieces(mask, 8000))) == 25


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prunes_again", [True, False])
def test_a_product_and_its_gradients_are_those_of_a_dense_masked_matrix(bias: bool, prunes_again: bool) -> None:
    mask, x = some_mask(12, 20, 2, 4), drawn(3, 5, 20, seed=4).requires_grad_()
    dense, b = drawn(12, 20, seed=3), drawn(12, seed=5).requires_grad_() if bias else None
    values = gather(dense, pack(mask), 10).requires_grad_()
    again = drawn(12, 10, seed=6) > 0 if prunes_again else torch.ones(12, 10, dtype=torch.bool)
    y = masked_linear(x, values, pack(mask), b, pack(again) if prunes_again else None)
    grad = drawn(3, 5, 12, seed=7)
    y.backward(grad)
    torch.testing.assert_close(y, F.linear(x, dense * mask, b))
    torch.testing.assert_close(x.grad, grad @ compose(values.detach() * again, pack(mask), 20))
    torch.testing.assert_close(values.grad, torch.einsum("abo,abi->oi", grad, x.detach())[mask].view(12, 10))
    assert b is None or b.grad is not None and torch.allclose(b.grad, grad.sum((0, 1)))


def test_under_autocast_gradients_have_the_dtype_of_their_tensors() -> None:
    mask, x = some_mask(12, 20, 2, 4), drawn(7, 20, dtype=torch.float32).requires_grad_()
    values = drawn(12, 10, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, values, pack(mask))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and values.grad is not None
    assert x.grad.dtype == values.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ compose(values, pack(mask), 20).t(), atol=0.1, rtol=0.02)


def test_a_part_is_its_matrix() -> None:
    mask, values = some_mask(12, 20, 2, 4), drawn(12, 10)
    part = MaskedPart(values, pack(mask), 20)
    assert part.norm().item() == pytest.approx(part.dense().norm().item()) and part.group == "sparse"
    np.testing.assert_allclose(part.singular_values().numpy(), np.linalg.svd(part.dense().numpy(), compute_uv=False))
