"""The published layer computes what its formula says, by hand-written gradients that agree with plain autograd."""

import torch
import torch.nn.functional as F

from sltrain.benchmarks.published import PublishedLinear


def test_output_and_gradients_are_those_of_the_dense_formula() -> None:
    torch.manual_seed(0)
    layer = PublishedLinear(13, 9, rank=4, sparsity=0.2, alpha=8, dtype=torch.float64)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(2, 5, 9, dtype=torch.float64)
    parameters = [layer.A, layer.B, layer.values]

    sparse = torch.zeros(9 * 13, dtype=torch.float64).index_put((layer.indices,), layer.values).view(9, 13)
    expected = F.linear(x, 8 / 4 * layer.B @ layer.A + sparse)
    y = layer(x)

    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, [x, *parameters], grad_y)
    for ours, theirs in zip(found, torch.autograd.grad(expected, [x, *parameters], grad_y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_parameters_are_the_published_ones() -> None:
    layer = PublishedLinear(13, 9, rank=4, sparsity=0.2, alpha=8)
    assert layer.indices.dtype == torch.int64
    assert len(layer.indices.unique()) == int(0.2 * 13 * 9) == len(layer.values)
    assert layer.A.shape == (4, 13) and layer.B.shape == (9, 4) and not layer.B.any()
