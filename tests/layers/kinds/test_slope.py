"""The layer of method=slope: both masks, the biased gradient, the adapters, and refusals."""

import pytest
import torch
from torch import nn

from sltrain.layers import LAYERS
from sltrain.layers.kinds.slope import SLoPeLinear
from sltrain.layers.kinds.sparse import SparseLinear
from sltrain.layers.masked import compose, unpack


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks_of(layer: SLoPeLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Of S and of S2."""
    in_backward = compose(torch.ones_like(layer.values), layer.mask, layer.in_features, layer.again)
    return unpack(layer.mask, layer.in_features), in_backward > 0


@pytest.mark.parametrize("prune", ["random", "magnitude"])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8)])
def test_rows_keep_n_of_m_and_columns_of_s2_the_n_largest_that_are_left(keep: int, of: int, prune: str) -> None:
    layer = SLoPeLinear(64, 48, keep, of, 4, generator=generator(), prune=prune)
    forward, backward = masks_of(layer)
    assert (forward.view(48, -1, of).sum(2) == keep).all()
    assert not (backward & ~forward).any()
    sizes = layer.dense_weight().abs().view(-1, of, 64)
    left, kept = forward.view(-1, of, 64).sum(1), backward.view(-1, of, 64)
    assert torch.equal(kept.sum(1), left.clamp(max=keep))
    dropped = sizes.masked_fill(kept, 0).amax(1)
    assert (sizes.masked_fill(~kept, 9).amin(1) >= dropped).all() and (dropped > 0).any()


def test_a_dense_matrix_is_pruned_twice() -> None:
    weight = torch.randn(16, 24, generator=generator(1))
    layer = SLoPeLinear.from_dense(weight, keep=2, of=4, rank=3, prune="magnitude")
    sparse = SparseLinear.from_dense(weight, keep=2, of=4, prune="magnitude")
    assert torch.equal(layer.dense_weight(), sparse.dense_weight())
    forward, backward = masks_of(layer)
    again = SparseLinear.from_dense(sparse.dense_weight().t().contiguous(), keep=2, of=4, prune="magnitude")
    assert torch.equal(layer.dense_weight() * backward, again.dense_weight().t())


@pytest.mark.parametrize("has_adapters", [True, False])
def test_the_output_is_exact_and_so_are_all_gradients_but_that_of_x(has_adapters: bool) -> None:
    layer = SLoPeLinear(24, 16, 2, 4, 3, has_adapters, bias=True, generator=generator(), dtype=torch.float64)
    if has_adapters:
        layer.B.data.normal_(generator=generator(1))
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    weight = layer.dense_weight().requires_grad_()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    layer(x).square().sum().backward()
    given, own = x.grad, layer.values.grad
    assert given is not None and own is not None
    forward, backward = masks_of(layer)
    grad_y = 2 * nn.functional.linear(x, weight, layer.bias).detach()
    adapters = layer.scale * layer.B @ layer.A if has_adapters else 0
    sparse = layer.parts()["S"].dense()
    torch.testing.assert_close(given, grad_y @ (sparse * backward + adapters))
    assert not torch.allclose(given, grad_y @ weight)
    torch.testing.assert_close(own.flatten(), (grad_y.t() @ x)[forward])


def test_adapters_leave_the_function_as_it_was() -> None:
    layer = SLoPeLinear(24, 16, 2, 4, 3, generator=generator())
    x = torch.randn(5, 24)
    before, trained = layer(x), layer.num_trained
    layer.add_adapters()
    layer.start_adapters(generator(2))
    assert torch.equal(layer(x), before)
    assert layer.num_trained == trained + 3 * (24 + 16) == layer.multiply_adds()
    layer(x).square().sum().backward()
    assert layer.B.grad is not None and layer.B.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("sides", "rank", "message"),
    [
        ((24, 16), 0, "rank must be between 1 and 16 for a 16 x 24 matrix, got 0"),
        ((24, 16), 17, "rank must be between 1 and 16"),
        ((24, 3), 1, "cannot keep 2 of every 4 entries of a column of 3"),
        ((3, 24), 1, "cannot keep 2 of every 4 entries of a row of 3"),
    ],
)
def test_what_is_refused(sides: tuple[int, int], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLoPeLinear(*sides, 2, 4, rank)


def test_its_words_and_its_kind() -> None:
    layer = SLoPeLinear(40, 32, 2, 4, 3)
    words = "in_features=40, out_features=32, keep=2, of=4, rank=3, has_adapters=False, bias=False"
    assert repr(layer) == f"SLoPeLinear({words})"
    assert LAYERS.load("slope") is SLoPeLinear
    assert layer.mask.numel() + layer.again.numel() == 40 * 32 / 8 + 32 * 3  # 20 kept of a row: 3 bytes
