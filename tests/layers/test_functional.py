"""Both ways to compute y = x W^T, with every support, against plain autograd over the dense formula."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sltrain import kernels
from sltrain.layers import aligned
from sltrain.layers.functional import Weight, aligned_linear, compose_weight, composed_linear, factored_linears
from sltrain.layers.support import KINDS, make_support
from sltrain.layers.support import base as support_module

SCALE = 0.75
SHAPES = [  # input shape, out, rank, sparsity
    ((5, 12), 8, 3, 0.3),
    ((2, 4, 12), 20, 5, 0.1),
    ((12,), 6, 2, 0.5),
    ((3, 9), 9, 0, 0.4),
    ((3, 9), 11, 4, 0.0),
    ((0, 9), 11, 4, 0.2),
    ((2, 0, 9), 4, 2, 0.25),
    ((70, 33), 21, 4, 0.1),
]
PATHS = [(path, kind) for path in ("composed", "factored") for kind in KINDS]
every_path = pytest.mark.parametrize("path, kind", PATHS)


@pytest.fixture(params=["kernel", "plain"])
def arithmetic(request, monkeypatch):
    """float32 through the CPU kernel where there is one, and through plain torch."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "status", lambda: "switched off")
    elif kernels.status() is not None:
        pytest.skip(kernels.status())


def make(shape, out_features, rank, sparsity, bias=True, dtype=torch.float64, kind="uniform", seed=0):
    """x and a Weight with fixed random values."""
    source, in_features = torch.Generator().manual_seed(seed), shape[-1]
    if kind not in ("uniform", "stratified"):
        sparsity = max(sparsity, 0.12)  # they need some
    support = make_support(out_features, in_features, sparsity, kind)

    def normal(*size):
        return torch.randn(*size, generator=source, dtype=torch.float64).to(dtype).requires_grad_()

    A, B, values = normal(rank, in_features), normal(out_features, rank), normal(support.num_nonzero)
    indices = support.draw(source)
    return normal(*shape), Weight(A, B, values, indices, support, SCALE, normal(out_features) if bias else None)


def trained(x, weight):
    """The tensors that need a gradient, in a fixed order."""
    candidates = [x, weight.A, weight.B, weight.values, weight.bias]
    return [tensor for tensor in candidates if tensor is not None and tensor.requires_grad]


def dense_linear(x, w):
    """The formula, by torch's own autograd: S by index_put into zeros, W = scale B A + S, F.linear."""
    positions = w.support.positions(w.indices).long()
    flat = torch.zeros(w.support.num_entries, dtype=w.values.dtype).index_put((positions,), w.values)
    product = torch.einsum("or,ri->oi", w.B, w.A)
    if w.residual:
        out_features, rank = w.B.shape
        R = torch.kron(torch.eye(rank), torch.ones(math.ceil(out_features / rank), 1))[:out_features].double()
        product = product + w.residual / w.scale * torch.einsum("or,ri->oi", R, w.A)
    return F.linear(x, w.scale * product + flat.view(product.shape), w.bias)


def run(function, x, weight, upstream):
    """Output and gradients of x, A, B, values, bias (those that need one)."""
    y = function(x, weight)
    return y, torch.autograd.grad(y, trained(x, weight), upstream.to(y.dtype))


def by(path):
    """(x, weight) -> y on this path."""
    if path == "composed":
        return composed_linear
    return lambda x, weight: factored_linears(x, [weight])[0]


def assert_same(found, expected, **tolerance):
    (y, gradients), (expected_y, expected_gradients) = found, expected
    torch.testing.assert_close(y, expected_y, **tolerance)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


@every_path
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_equals_the_dense_formula(case, bias, path, kind):
    x, weight = make(*case, bias=bias, kind=kind)
    upstream = torch.randn(*case[0][:-1], case[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = run(by(path), x, weight, upstream), run(dense_linear, x, weight, upstream)
    assert_same(found, expected, rtol=1e-11, atol=1e-11)


@every_path
@pytest.mark.parametrize("case", [((5, 12), 8, 3, 0.3), ((2, 4, 12), 20, 5, 0.1), ((3, 9), 10, 9, 0.0)], ids=str)
def test_a_residual_is_part_of_the_dense_formula(case, path, kind):
    x, weight = make(*case, kind=kind)
    weight = dataclasses.replace(weight, residual=1.3)
    upstream = torch.randn(*case[0][:-1], case[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = run(by(path), x, weight, upstream), run(dense_linear, x, weight, upstream)
    assert_same(found, expected, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(found[0], by(path)(x, dataclasses.replace(weight, residual=0.0)))


@every_path
@pytest.mark.parametrize("case", [((70, 33), 21, 4, 0.1), ((300, 64), 96, 8, 0.05), ((0, 9), 11, 4, 0.2)], ids=str)
def test_equals_the_dense_formula_in_float32(case, path, kind, arithmetic):
    x, weight = make(*case, kind=kind, dtype=torch.float32)
    upstream = torch.randn(case[0][0], case[1], generator=torch.Generator().manual_seed(1))
    assert_same(run(by(path), x, weight, upstream), run(dense_linear, x, weight, upstream), rtol=3e-4, atol=3e-4)


@every_path
@pytest.mark.parametrize("case", [case for case in SHAPES[:5]], ids=str)
def test_gradcheck(case, path, kind):
    x, weight = make(*case, kind=kind)

    def function(x, A, B, values, bias):
        return by(path)(x, dataclasses.replace(weight, A=A, B=B, values=values, bias=bias))

    assert torch.autograd.gradcheck(function, trained(x, weight))


@pytest.mark.parametrize("path", ["composed", "factored"])
@pytest.mark.parametrize("names", ["x", "A", "B", "values", "bias", "A values", "x bias", "A B values bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_right_one(names, path):
    x, weight = make((2, 4, 12), 7, 3, 0.3)
    for name, tensor in {"x": x, "A": weight.A, "B": weight.B, "values": weight.values, "bias": weight.bias}.items():
        tensor.requires_grad_(name in names.split())
    upstream = torch.ones(2, 4, 7)
    found = run(by(path), x, weight, upstream)
    assert len(found[1]) == len(names.split())
    assert_same(found, run(dense_linear, x, weight, upstream))


@pytest.mark.parametrize("kind", KINDS)
def test_several_weights_share_one_x(kind):
    """q, k, v and gate, up: outputs and gradients of a group are those of its members, x's is their sum."""
    x, _ = make((2, 5, 64), 32, 4, 0.1)
    weights = [make((1, 64), out, rank, 0.1, kind=kind, seed=out)[1] for out, rank in ((32, 4), (48, 8), (40, 1))]
    sums = [[], []]
    for found, function in zip(
        sums, (factored_linears, lambda x, weights: [dense_linear(x, w) for w in weights]), strict=True
    ):
        ys = function(x, weights)
        tensors = [x, *(t for w in weights for t in trained(x, w)[1:])]
        loss = sum((y * torch.arange(1, y.shape[-1] + 1)).square().sum() for y in ys[:2])  # the third one is not used
        found += [*ys, *torch.autograd.grad(loss, tensors, allow_unused=True)]
    for ours, reference in zip(*sums, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if reference is None else reference)


@every_path
@pytest.mark.parametrize("shape", [((6, 48), 64), ((6, 37), 61)], ids=str)
def test_positions_in_pieces_give_the_same_bits(shape, path, kind, arithmetic, monkeypatch):
    x, weight = make(*shape, 4, 0.2, dtype=torch.float32, kind=kind)
    upstream = torch.randn(6, shape[1], generator=torch.Generator().manual_seed(1))
    whole = run(by(path), x, weight, upstream)
    monkeypatch.setattr(support_module, "CHUNK_ENTRIES", 13)
    assert len(list(weight.support.pieces(weight.indices))) > 10
    assert_same(run(by(path), x, weight, upstream), whole, rtol=0, atol=0)


@every_path
@pytest.mark.parametrize("shape", [((6, 48), 64), ((6, 37), 61)], ids=str)
def test_nothing_asks_what_was_drawn(shape, path, kind, monkeypatch):
    """On meta there is nothing to ask: what would make the host wait for a GPU fails here."""
    monkeypatch.setattr(support_module, "CHUNK_ENTRIES", 200)
    x, weight = make(*shape, 4, 0.2, dtype=torch.float32, kind=kind)
    on_meta = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    on_meta |= {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in on_meta.items()
        if isinstance(tensor, torch.Tensor)
    }
    x = x.detach().to("meta").requires_grad_()
    y, gradients = run(by(path), x, Weight(**on_meta), torch.empty(6, shape[1], device="meta"))
    assert y.is_meta and all(gradient.is_meta for gradient in gradients)


class CountProducts(TorchDispatchMode):
    """Counts matrix products, and notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize(
    ("names", "products"), [("x A B values", 5), ("A B values", 3), ("values", 1), ("A", 2), ("x", 2)]
)
def test_composed_backward_does_only_the_work_that_is_asked_for(names, products):
    x, weight = make((6, 12), 7, 3, 0.3, bias=False)
    for name, tensor in {"x": x, "A": weight.A, "B": weight.B, "values": weight.values}.items():
        tensor.requires_grad_(name in names.split())
    y = composed_linear(x, weight)
    with CountProducts() as counter:
        y.backward(torch.ones_like(y))
    assert counter.count == products


@every_path
def test_nothing_dense_lives_between_forward_and_backward(path, kind):
    """Saved are x, the parameters and indices, and on the factored path x A^T: their bytes and no more."""
    x, weight = make((4, 16, 64), 96, 4, 0.05, dtype=torch.float32, kind=kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = by(path)(x, weight)
    allowed = [x, weight.A, weight.B, weight.values, weight.indices, weight.bias]
    foreign = [tensor for tensor in saved if tensor.data_ptr() not in {tensor.data_ptr() for tensor in allowed}]
    assert [tensor.shape for tensor in foreign] == ([(64, 4)] if path == "factored" else [])
    y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_factored_path_never_holds_a_dense_matrix(kind, arithmetic):
    x, weight = make((8, 512), 1024, 4, 0.03, dtype=torch.float32, kind=kind)
    with CountProducts() as counter:
        factored_linears(x, [weight])[0].sum().backward()
    assert 0 < counter.largest <= 1024 * 512 / 3.9


@every_path
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(x_dtype, path, kind):
    x, weight = make((3, 5, 32), 24, 4, 0.2, dtype=torch.float32, kind=kind)
    x = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = by(path)(x, weight)
        reference = dense_linear(x.float(), weight)
    assert y.dtype == torch.bfloat16 == reference.dtype
    exact = dense_linear(x.float(), weight)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.2)
    tensors = trained(x, weight)
    gradients = torch.autograd.grad(y.float().square().sum(), tensors)
    expected = torch.autograd.grad(exact.square().sum(), tensors)
    for gradient, reference, tensor in zip(gradients, expected, tensors, strict=True):
        assert gradient.dtype == tensor.dtype
        assert (gradient.float() - reference.float()).norm() < 0.03 * reference.float().norm()


@pytest.mark.parametrize("path", ["composed", "factored"])
def test_autocast_leaves_float64_alone(path):
    x, weight = make((5, 12), 7, 3, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert by(path)(x, weight).dtype == torch.float64


@every_path
def test_bfloat16_is_close_to_float64(path, kind):
    x, weight = make((3, 5, 32), 24, 4, 0.2, dtype=torch.bfloat16, kind=kind)

    def exact(tensor):
        return tensor.detach().double().requires_grad_()

    high = {name: exact(getattr(weight, name)) for name in ("A", "B", "values", "bias")}
    upstream = torch.ones(3, 5, 24)
    y, gradients = run(by(path), x, weight, upstream)
    expected_y, expected = run(dense_linear, exact(x), dataclasses.replace(weight, **high), upstream)
    for ours, reference in zip([y, *gradients], [expected_y, *expected], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("path", ["composed", "factored"])
def test_mixed_dtypes_are_refused_as_in_a_linear(path):
    x, weight = make((5, 12), 7, 3, 0.3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        by(path)(x.double(), weight)


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_non_contiguous_input_and_gradient(path, kind, dtype):
    x, _ = make((12, 5), 7, 3, 0.3, dtype=dtype)
    _, weight = make((5, 12), 7, 3, 0.3, dtype=dtype, kind=kind)
    upstream = torch.ones(1, 1, dtype=dtype).expand(5, 7)
    found = run(lambda x, w: by(path)(x.t(), w), x, weight, upstream)
    assert_same(found, run(lambda x, w: dense_linear(x.t(), w), x, weight, upstream))


@every_path
def test_checkpointing_gives_the_same_gradients(path, kind, arithmetic):
    x, weight = make((2, 4, 12), 7, 3, 0.3, kind=kind, dtype=torch.float32)
    upstream = torch.ones(2, 4, 7)
    found = run(by(path), x, weight, upstream)
    again = run(lambda x, w: checkpoint(by(path), x, w, use_reentrant=False), x, weight, upstream)
    assert_same(again, found, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["composed", "factored"])
def test_a_second_derivative_is_refused_instead_of_wrong(path):
    x, weight = make((5, 12), 7, 3, 0.3)
    (gradient,) = torch.autograd.grad(by(path)(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_path
def test_compiled_equals_eager(path, kind, arithmetic):
    x, weight = make((2, 4, 12), 7, 3, 0.3, dtype=torch.float32, kind=kind)
    upstream = torch.ones(2, 4, 7)
    torch.compiler.reset()  # dynamo keeps no more than eight graphs of one function
    compiled = torch.compile(by(path), backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, x, weight, upstream), run(by(path), x, weight, upstream))


@pytest.mark.parametrize("kind", KINDS)
def test_compose_weight_is_the_formula(kind):
    _, weight = make((5, 12), 7, 3, 0.3, kind=kind)
    with torch.no_grad():
        identity = torch.eye(12, dtype=torch.float64)
        expected = dense_linear(identity, dataclasses.replace(weight, bias=None)).t()
        torch.testing.assert_close(compose_weight(weight), expected)


@pytest.mark.parametrize("shape", [((5, 12), 7), ((2, 3, 16), 8), ((4, 13), 16)], ids=str)
def test_aligned_products_are_those_of_the_sides_as_they_are(shape, monkeypatch):
    """As on CUDA, where sides are filled up with zeros inside a product."""
    monkeypatch.setattr(aligned, "alignment", lambda tensor: 8)
    x, weight = make(*shape, 3, 0.3)
    upstream = torch.randn(*shape[0][:-1], shape[1], dtype=torch.float64)
    assert_same(run(composed_linear, x, weight, upstream), run(dense_linear, x, weight, upstream))
    dense = compose_weight(weight).detach().requires_grad_()
    found, expected = (f(x, dense, weight.bias) for f in (aligned_linear, F.linear))
    torch.testing.assert_close(found, expected)
    tensors = (x, dense, weight.bias)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda tensor: tensor):
        aligned_linear(*tensors)
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in tensors}
    for ours, reference in zip(*(torch.autograd.grad(y, tensors, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, reference)
