"""The memory-saving function against plain autograd over the dense formula, in every setting it promises to work in."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sltrain.layers.functional import compose_weight, sltrain_linear
from sltrain.layers.support import draw_support

SCALE = 0.75
SHAPES = [  # input shape, out, rank, sparsity
    ((5, 12), 7, 3, 0.3),
    ((2, 4, 12), 20, 5, 0.1),
    ((12,), 6, 2, 0.5),
    ((3, 9), 9, 0, 0.4),
    ((3, 9), 11, 4, 0.0),
    ((0, 9), 11, 4, 0.2),
    ((2, 0, 9), 4, 2, 0.2),
]


def make(shape, out_features, rank, sparsity, bias=True, dtype=torch.float64):
    """x, A, B, values, indices, bias with fixed random values."""
    source, in_features = torch.Generator().manual_seed(0), shape[-1]
    indices = draw_support(out_features, in_features, sparsity, source)

    def normal(*size):
        return torch.randn(*size, generator=source, dtype=torch.float64).to(dtype).requires_grad_()

    factors = normal(rank, in_features), normal(out_features, rank), normal(len(indices))
    return normal(*shape), *factors, indices, normal(out_features) if bias else None


def dense_linear(x, A, B, values, indices, bias):
    """The formula, by torch's own autograd: S by index_put into zeros, W = scale B A + S, F.linear."""
    flat = torch.zeros(B.shape[0] * A.shape[1], dtype=values.dtype).index_put((indices.long(),), values)
    return F.linear(x, SCALE * torch.einsum("or,ri->oi", B, A) + flat.view(B.shape[0], A.shape[1]), bias)


def run(function, tensors, upstream):
    """Output and gradients of x, A, B, values, bias (those that need one)."""
    inputs = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    y = function(*tensors)
    return y, torch.autograd.grad(y, inputs, upstream.to(y.dtype))


def ours(x, A, B, values, indices, bias):
    return sltrain_linear(x, A, B, values, indices, SCALE, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_equals_the_dense_formula(case, bias):
    tensors = make(*case, bias=bias)
    upstream = torch.randn(*case[0][:-1], case[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, gradients = run(ours, tensors, upstream)
    expected_y, expected = run(dense_linear, tensors, upstream)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in SHAPES if 0 not in case[0]], ids=str)
def test_gradcheck(case):
    x, A, B, values, indices, bias = make(*case)
    assert torch.autograd.gradcheck(
        lambda x, A, B, values, bias: ours(x, A, B, values, indices, bias), (x, A, B, values, bias)
    )


@pytest.mark.parametrize("trained", ["x", "A", "B", "values", "bias", "A values", "x bias", "A B values bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_right_one(trained):
    names = ["x", "A", "B", "values", "indices", "bias"]
    tensors = make((2, 4, 12), 7, 3, 0.3)
    for name, tensor in zip(names, tensors, strict=True):
        if name != "indices":
            tensor.requires_grad_(name in trained.split())
    upstream = torch.ones(2, 4, 7)
    _, gradients = run(ours, tensors, upstream)
    _, expected = run(dense_linear, tensors, upstream)
    assert len(gradients) == len(trained.split())
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "products"), [("x A B values", 5), ("A B values", 3), ("values", 1), ("A", 2), ("x", 2)]
)
def test_backward_does_only_the_work_that_is_asked_for(trained, products):
    tensors = make((6, 12), 7, 3, 0.3, bias=False)
    for name, tensor in zip(["x", "A", "B", "values"], tensors, strict=False):
        tensor.requires_grad_(name in trained.split())
    y = ours(*tensors)
    with CountProducts() as counter:
        y.backward(torch.ones_like(y))
    assert counter.count == products


def test_nothing_dense_lives_between_forward_and_backward():
    """Saved are x, A, B, values and indices: their bytes and no more."""
    x, A, B, values, indices, bias = make((4, 16, 64), 96, 4, 0.05, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = sltrain_linear(x, A, B, values, indices, SCALE, bias)
    assert all(tensor.numel() < 96 * 64 for tensor in saved)
    allowed = (x, A, B, values, indices)
    assert sum(tensor.nbytes for tensor in saved) <= sum(tensor.nbytes for tensor in allowed)
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in allowed}
    y.sum().backward()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(x_dtype):
    tensors = make((3, 5, 32), 24, 4, 0.2, dtype=torch.float32)
    x = tensors[0].detach().to(x_dtype).requires_grad_()
    tensors = (x, *tensors[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(*tensors)
        reference = dense_linear(x.float(), *tensors[1:])
    assert y.dtype == torch.bfloat16 == reference.dtype
    exact = dense_linear(x.float(), *tensors[1:])
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.15)
    y.float().square().sum().backward()
    gradients = [tensor.grad for tensor in tensors if tensor.requires_grad]
    expected = torch.autograd.grad(
        exact.square().sum(), [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    )
    for gradient, reference, tensor in zip(gradients, expected, [x, *tensors[1:4], tensors[5]], strict=True):
        assert gradient.dtype == tensor.dtype
        assert (gradient.float() - reference.float()).norm() < 0.03 * reference.float().norm()


def test_autocast_leaves_float64_alone():
    tensors = make((5, 12), 7, 3, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(*tensors).dtype == torch.float64


def test_bfloat16_is_close_to_float64():
    low = make((3, 5, 32), 24, 4, 0.2, dtype=torch.bfloat16)
    high = [tensor if tensor.dtype == torch.int32 else tensor.detach().double().requires_grad_() for tensor in low]
    upstream = torch.ones(3, 5, 24)
    y, gradients = run(ours, low, upstream)
    expected_y, expected = run(dense_linear, high, upstream)
    assert y.dtype == torch.bfloat16
    for ours_, reference in zip([y, *gradients], [expected_y, *expected], strict=True):
        assert ours_.dtype == torch.bfloat16
        assert (ours_.double() - reference).norm() < 0.02 * reference.norm()


def test_mixed_dtypes_are_refused_as_in_a_linear():
    x, *rest = make((5, 12), 7, 3, 0.3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        ours(x.double(), *rest)


def test_non_contiguous_input_and_gradient():
    x, A, B, values, indices, bias = make((12, 5), 7, 3, 0.3)
    A, values, indices = make((5, 12), 7, 3, 0.3)[1], *make((5, 12), 7, 3, 0.3)[3:5]
    upstream = torch.ones(1, 1, dtype=torch.float64).expand(5, 7)
    y, gradients = run(ours, (x.t(), A, B, values, indices, bias), upstream)
    expected_y, expected = run(dense_linear, (x.t(), A, B, values, indices, bias), upstream)
    torch.testing.assert_close(y, expected_y)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_checkpointing_gives_the_same_gradients():
    tensors = make((2, 4, 12), 7, 3, 0.3)
    upstream = torch.ones(2, 4, 7)
    y, gradients = run(ours, tensors, upstream)
    again, recomputed = run(lambda *args: checkpoint(ours, *args, use_reentrant=False), tensors, upstream)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


def test_a_second_derivative_is_refused_instead_of_wrong():
    x, *rest = make((5, 12), 7, 3, 0.3)
    (gradient,) = torch.autograd.grad(ours(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled_equals_eager():
    tensors = make((2, 4, 12), 7, 3, 0.3, dtype=torch.float32)
    upstream = torch.ones(2, 4, 7)
    y, gradients = run(ours, tensors, upstream)
    compiled_y, compiled = run(torch.compile(ours, backend="aot_eager"), tensors, upstream)
    torch.testing.assert_close(compiled_y, y)
    for gradient, reference in zip(compiled, gradients, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_compose_weight_is_the_formula():
    _, A, B, values, indices, _ = make((5, 12), 7, 3, 0.3)
    with torch.no_grad():
        identity = torch.eye(12, dtype=torch.float64)
        expected = dense_linear(identity, A, B, values, indices, None).t()
        torch.testing.assert_close(compose_weight(A, B, values, indices, SCALE), expected)
