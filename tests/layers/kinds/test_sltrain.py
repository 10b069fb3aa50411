"""SLTrain's layer: the paper's start, its function on every path, meta construction, state and refusals."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from sltrain.layers import LAYERS, LowRankLinear, SLTrainLinear
from sltrain.layers.aligned import AlignedLinear
from sltrain.layers.support import KINDS, make_support


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
    assert torch.equal(layer.indices, make_support(300, 400, 0.03).draw(generator()))


@pytest.mark.parametrize("make", [
    lambda: LowRankLinear(400, 300, rank=16, alpha=8, generator=generator(), start="uniform"),
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
@pytest.mark.parametrize("support", KINDS)
def test_every_support_and_path_is_the_dense_weight(support, path):
    layer = SLTrainLinear(48, 36, 4, 0.1, 8, dtype=torch.float64, support=support, path=path)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    assert layer.values.numel() == torch.count_nonzero(layer.dense_weight() - layer.scale * layer.B @ layer.A)
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


@pytest.mark.parametrize("support", KINDS)
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
    assert layer.num_trained == direct.num_trained == 280 + 120 == layer.multiply_adds()
    layer.to_empty(device="cpu").reset_parameters(generator())
    for name, tensor in direct.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
        assert tensor.dtype == (torch.uint16 if name == "indices" else dtype)


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
@pytest.mark.parametrize("support", KINDS)
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
        "SLTrainLinear(in_features=40, out_features=30, rank=4, alpha=8, sparsity=0.1, support=uniform, bias=False, "
        "path=auto)"
    )
    assert "support=block, block_size=4, bias=False, path=factored" in repr(
        SLTrainLinear(40, 40, 4, 0.1, 8, support="block", path="factored")
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
    with pytest.raises(ValueError, match="unknown path 'fast': choose one of auto, composed, factored"):
        SLTrainLinear(40, 30, 4, 0.1, 8, path="fast")


# ---- the layer's own choice of a path

NARROW = dict(in_features=256, out_features=384, rank=16, sparsity=0.03, alpha=8)  # far cheaper through the factors
WIDE = dict(in_features=64, out_features=64, rank=60, sparsity=0.1, alpha=8)  # a rank that saves nothing


@pytest.mark.parametrize(("shape", "path"), [(NARROW, "factored"), (WIDE, "composed")], ids=["narrow", "wide"])
def test_the_first_forward_fixes_the_cheaper_path(shape, path):
    layer = SLTrainLinear(**shape)
    assert layer.path == "auto" and "path=auto" in repr(layer)
    layer(torch.randn(4, 1024, shape["in_features"]))
    assert layer.path == path and f"path={path}" in repr(layer)
    layer(torch.randn(1, shape["in_features"]))
    assert layer.path == path


def test_the_number_of_rows_decides_where_w_has_to_be_built():
    """In float64 no kernel helps: S is made dense for many rows, and W for few would cost more than it saves."""
    shape = dict(in_features=512, out_features=512, rank=256, sparsity=0.03, alpha=8, dtype=torch.float64)
    few, many = SLTrainLinear(**shape), SLTrainLinear(**shape)
    few(torch.randn(1, 512, dtype=torch.float64))
    many(torch.randn(2048, 512, dtype=torch.float64))
    assert (few.path, many.path) == ("factored", "composed")
    assert (few.path, many.path) == tuple(SLTrainLinear(**shape).choose_path(n, torch.device("cpu")) for n in (1, 2048))


def test_what_is_typed_is_never_changed():
    layer = SLTrainLinear(**NARROW, path="composed")
    layer(torch.randn(4096, 256))
    assert layer.path == "composed"


@pytest.mark.parametrize("together", [True, False])
def test_a_path_chosen_at_first_gives_the_bits_of_the_same_path_typed(together):
    def outputs(**path):
        layers = [SLTrainLinear(**NARROW, generator=generator(seed), **path) for seed in (1, 2)]
        x = torch.randn(100, 256, generator=generator(3), requires_grad=True)
        ys = SLTrainLinear.forward_together(x, layers) if together else [layer(x) for layer in layers]
        assert [layer.path for layer in layers] == ["factored"] * 2
        return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *layers[0].parameters()])]

    for ours, typed in zip(outputs(), outputs(path="factored"), strict=True):
        assert torch.equal(ours, typed)


def test_copies_and_state_dicts_of_a_layer_that_has_not_chosen():
    layer = SLTrainLinear(**NARROW)
    before, state = copy.deepcopy(layer), layer.state_dict()
    x = torch.randn(8, 256)
    y = layer(x)
    assert before.path == "auto" and copy.deepcopy(layer).path == layer.path != "auto"
    assert state.keys() == layer.state_dict().keys() == {"A", "B", "values", "indices"}
    torch.testing.assert_close(before(x), y)
    fresh = SLTrainLinear(**NARROW)
    fresh.load_state_dict(state)
    assert fresh.path == "auto"
    torch.testing.assert_close(fresh(x), y)


def test_shapes_alone_fix_nothing():
    layer = SLTrainLinear(**NARROW, device="meta")
    assert layer(torch.empty(8, 256, device="meta")).shape == (8, 384)
    assert layer.path == "auto"


COMPILED_FIRST = """
import torch
from sltrain.layers import SLTrainLinear
layer = SLTrainLinear(256, 384, 16, 0.03, 8)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
for num_rows in (128, 128, 64):
    x = torch.randn(num_rows, 256)
    y = compiled(x)
    y.sum().backward()
    assert layer.path == "factored", layer.path
    grad, layer.A.grad = layer.A.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(grad, layer.A.grad)
    layer.zero_grad()
"""


@pytest.mark.slow
def test_a_layer_that_is_compiled_before_anything_else_chooses_too():
    """In a process of its own, where the kernel is built while the layer is traced."""
    done = subprocess.run([sys.executable, "-c", COMPILED_FIRST], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_its_kind_is_registered():
    assert LAYERS.load("sltrain") is SLTrainLinear and {"sltrain", "low_rank"} <= set(LAYERS.names())


def test_a_column_support_warns_of_the_rank():
    assert SLTrainLinear(40, 30, 4, 0.1, 8).warnings() == {}
    (line,) = SLTrainLinear(40, 30, 4, 0.1, 8, support="column").warnings().values()
    assert "(the first layer: 4 + 4 of 30)" in line
