"""The modules: the paper's start, meta construction, state, norms and refusals."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sltrain.layers import AlignedLinear, LowRankLinear, SLTrainLinear, linear
from sltrain.layers.support import Support


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_start_is_the_papers():
    layer = SLTrainLinear(400, 300, rank=16, sparsity=0.03, alpha=32, generator=generator())
    bound = 1 / math.sqrt(400)
    assert layer.A.shape == (16, 400) and layer.B.shape == (300, 16) and layer.values.shape == (3600,)
    assert layer.scale == 2.0 and layer.bias is None
    assert torch.count_nonzero(layer.B) == 0
    for tensor in (layer.A, layer.values):
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.99 * bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert tensor.mean().item() == pytest.approx(0, abs=0.1 * bound)
    assert torch.equal(layer.indices, Support(300, 400, 0.03).draw(generator()))


@pytest.mark.parametrize("make", [
    lambda: LowRankLinear(400, 300, rank=16, alpha=8, generator=generator()),
    lambda: SLTrainLinear(400, 300, rank=16, sparsity=0.0, alpha=8, generator=generator()),
])  # fmt: skip
def test_without_s_the_product_starts_like_an_ordinary_linear(make):
    assert make().dense_weight().std().item() == pytest.approx(nn.Linear(400, 300).weight.std().item(), rel=0.05)


@pytest.mark.parametrize("rank, sparsity", [(4, 0.1), (0, 0.1), (4, 0.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_weight(rank, sparsity, bias):
    layer = SLTrainLinear(24, 16, rank, sparsity, alpha=8, bias=bias, dtype=torch.float64)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("path", ["composed", "factored"])
@pytest.mark.parametrize("support", ["uniform", "stratified", "block", "column"])
def test_every_support_and_path_is_the_dense_weight(support, path):
    layer = SLTrainLinear(48, 36, 4, 0.1, 8, dtype=torch.float64, support=support, path=path)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    assert (
        layer.num_sparse
        == layer.values.numel()
        == torch.count_nonzero(layer.dense_weight() - layer.scale * layer.B @ layer.A)
    )
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight()))


@pytest.mark.parametrize("supports", [("uniform",) * 3, ("block",) * 3, ("uniform", "block", "uniform")], ids=str)
@pytest.mark.parametrize("paths", [("factored",) * 3, ("composed", "factored", "factored")], ids=str)
def test_layers_together_compute_what_they_compute_alone(supports, paths):
    layers = [
        SLTrainLinear(48, out, 4, 0.1, 8, dtype=torch.float64, support=support, path=path)
        for out, support, path in zip((48, 96, 36), supports, paths, strict=True)
    ]
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    for together, layer in zip(SLTrainLinear.forward_together(x, layers), layers, strict=True):
        torch.testing.assert_close(together, layer(x))


def test_an_aligned_linear_is_a_linear():
    aligned, plain = AlignedLinear(20, 13), nn.Linear(20, 13)
    plain.load_state_dict(aligned.state_dict())
    x = torch.randn(4, 20)
    torch.testing.assert_close(aligned(x), plain(x))


@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_forward_is_the_dense_weight(bias):
    layer = LowRankLinear(24, 16, 4, alpha=8, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(0, 12), sparsity=st.sampled_from([0.01, 0.2, 0.9]), seed=st.integers(0, 1000))
def test_norms_are_those_of_the_dense_matrices(rank, sparsity, seed):
    layer = SLTrainLinear(20, 12, rank, sparsity, alpha=5, generator=generator(seed), dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_(generator=generator(seed))
        product = layer.scale * layer.B @ layer.A
        sparse = layer.dense_weight() - product
    assert layer.low_rank_norm().dtype == layer.sparse_norm().dtype == torch.float32
    assert layer.low_rank_norm().shape == layer.sparse_norm().shape == ()
    assert layer.low_rank_norm().item() == pytest.approx(product.norm().item(), rel=1e-4, abs=1e-6)
    assert layer.sparse_norm().item() == pytest.approx(sparse.norm().item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(8))  # without the clamp rounding gives a negative square for some of them
def test_low_rank_norm_of_cancelling_factors_is_not_nan(seed):
    layer = LowRankLinear(64, 64, 2, alpha=2, generator=generator(seed))
    with torch.no_grad():
        layer.A[1] = -layer.A[0]
        layer.B[:, 1] = layer.B[:, 0] * (1 + 1e-7)
    assert layer.low_rank_norm().item() == pytest.approx(0, abs=0.01)
    assert layer.sparse_norm().item() == 0
    assert (layer.num_low_rank, layer.num_sparse) == (256, 0)


@pytest.mark.parametrize("support", ["uniform", "stratified", "block", "column"])
def test_every_support_is_complete_on_meta(support):
    direct = SLTrainLinear(40, 30, 4, 0.1, 8, generator=generator(), support=support)
    with torch.device("meta"):
        layer = SLTrainLinear(40, 30, 4, 0.1, 8, support=support)
    layer.to_empty(device="cpu").reset_parameters(generator())
    for name, tensor in direct.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor) and layer.state_dict()[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_then_empty_then_reset_is_direct_construction(dtype):
    direct = SLTrainLinear(40, 30, 4, 0.1, 8, bias=True, generator=generator(), dtype=dtype)
    with torch.device("meta"):
        layer = SLTrainLinear(40, 30, 4, 0.1, 8, bias=True, dtype=dtype)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert (layer.num_low_rank, layer.num_sparse) == (direct.num_low_rank, direct.num_sparse) == (280, 120)
    layer.to_empty(device="cpu").reset_parameters(generator())
    for name, tensor in direct.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
        assert tensor.dtype == (torch.uint16 if name == "indices" else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [101, 1009, 10**6])  # primes: no piece ends where a row does
def test_drawing_in_pieces_changes_no_number(at_once, dtype, monkeypatch):
    monkeypatch.setattr(linear, "DRAWN_AT_ONCE", at_once)
    layer = LowRankLinear(97, 53, 11, alpha=11, bias=True, generator=generator(), dtype=dtype)
    source, bound = generator(), 1 / math.sqrt(97)
    for tensor, b in ((layer.A, bound), (layer.B, math.sqrt(3 / 11)), (layer.bias, bound)):
        assert torch.equal(tensor, torch.empty(tensor.shape).uniform_(-b, b, generator=source).to(dtype))


def kept_for_backward(function):
    """Storages that autograd keeps, {address: elements}."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = function()  # alive, so that no address is used twice
    assert all(output.requires_grad for output in outputs)
    return kept


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("support", ["uniform", "stratified", "block", "column"])
@pytest.mark.parametrize("path", ["composed", "factored", "together", "low rank", "aligned"])
def test_projections_of_one_x_keep_it_once_and_no_copy_of_a_parameter(path, support, bias):
    """q, k, v: beside x and what the layers hold anyway only x A^T is kept, N rows of rank 4."""
    x = torch.randn(2, 5, 48, requires_grad=True)

    def make(out):
        if path == "low rank":
            return LowRankLinear(48, out, 4, 8, bias=bias)
        if path == "aligned":
            return AlignedLinear(48, out, bias=bias)
        way = "composed" if path == "composed" else "factored"
        return SLTrainLinear(48, out, 4, 0.1, 8, bias=bias, support=support, path=way)

    layers = [make(out) for out in (64, 32, 48)]
    if path == "together":
        kept = kept_for_backward(lambda: SLTrainLinear.forward_together(x, layers))
    else:
        kept = kept_for_backward(lambda: [layer(x) for layer in layers])
    held = {t.untyped_storage().data_ptr() for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    assert kept.pop(x.untyped_storage().data_ptr()) == 2 * 5 * 48
    hidden = [size for address, size in kept.items() if address not in held]
    assert sum(hidden) == (0 if path in ("composed", "aligned") else 3 * 2 * 5 * 4)


def test_reset_draws_a_new_support():
    layer = SLTrainLinear(40, 30, 4, 0.1, 8, generator=generator(0))
    before = copy.deepcopy(layer)
    layer.reset_parameters(generator(1))
    assert not torch.equal(layer.indices, before.indices)
    assert not torch.equal(layer.values, before.values)


def test_the_state_dict_carries_the_support():
    layer, other = (SLTrainLinear(40, 30, 4, 0.1, 8, generator=generator(seed)) for seed in (0, 1))
    assert set(layer.state_dict()) == {"A", "B", "values", "indices"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.dense_weight(), other.dense_weight())


def test_other_dtypes_leave_the_positions_alone():
    layer = SLTrainLinear(40, 30, 4, 0.1, 8)
    before = layer.dense_weight()
    assert layer.bfloat16().float().indices.dtype == torch.uint16
    assert torch.equal(layer.dense_weight() != 0, before != 0)


def test_repr_names_what_a_reader_wants_to_know():
    text = repr(SLTrainLinear(40, 30, 4, 0.1, 8))
    assert text == (
        "SLTrainLinear(in_features=40, out_features=30, rank=4, sparsity=0.1, alpha=8, bias=False, "
        "support=uniform, path=composed)"
    )
    assert "support=block, block_size=4, path=factored" in repr(
        SLTrainLinear(40, 40, 4, 0.1, 8, support="block", path="factored")
    )
    assert repr(LowRankLinear(40, 30, 4, 8, bias=True)) == (
        "LowRankLinear(in_features=40, out_features=30, rank=4, alpha=8, bias=True)"
    )


@pytest.mark.parametrize(
    ("rank", "sparsity", "alpha", "message"),
    [
        (-1, 0.1, 8, "rank must be between 0 and 30 for a 30 x 40 matrix, got -1"),
        (31, 0.1, 8, "rank must be between 0 and 30 for a 30 x 40 matrix, got 31"),
        (4, 1.0, 8, r"sparsity .* must be in \[0, 1\), got 1.0"),
        (4, -0.1, 8, r"sparsity .* must be in \[0, 1\), got -0.1"),
        (0, 0.0, 8, "rank 0 and sparsity 0.0 leave nothing to train"),
        (0, 1e-9, 8, "leave nothing to train"),
        (4, 0.1, 0, "alpha must be above 0"),
    ],
)
def test_impossible_settings_are_refused(rank, sparsity, alpha, message):
    with pytest.raises(ValueError, match=message):
        SLTrainLinear(40, 30, rank, sparsity, alpha)


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="unknown path 'fast': choose one of composed, factored"):
        SLTrainLinear(40, 30, 4, 0.1, 8, path="fast")


def test_a_low_rank_layer_needs_a_rank():
    with pytest.raises(ValueError, match="rank of at least 1"):
        LowRankLinear(40, 30, 0, 8)
