"""The two fused operations against the formulas written out, for autograd to differentiate."""

import pytest
import torch
import torch.nn.functional as F

from sltrain.models.fused import rms_norm, swiglu

EPS = 1e-3


def written_out_norm(x, weight):
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
    return weight * exact.to(x.dtype)


OPERATIONS = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, EPS), written_out_norm, [(3, 7, 10), (10,)]),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, [(3, 7, 10), (3, 7, 10)]),
}


def run(operation, shapes, dtype):
    """The result, its gradients for one random upstream gradient, and the sizes of what is kept for backward."""
    source = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=source).to(dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=source).to(dtype)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = operation(*inputs)
    before = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, before)  # the gradient of a residual is read by its other branch too
    return y, [tensor.grad for tensor in inputs], sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_equals_the_formula(name, dtype, tolerance):
    operation, written_out, shapes = OPERATIONS[name]
    y, gradients, num_bytes = run(operation, shapes, dtype)
    expected, expected_gradients, expected_bytes = run(written_out, shapes, dtype)
    assert torch.equal(y, expected) and y.dtype == dtype
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, exact, rtol=tolerance, atol=tolerance)
    assert num_bytes < 0.7 * expected_bytes


def test_the_norms_gradient_sums_bfloat16_rows_in_float32():
    """1000 equal contributions: a bfloat16 sum stops growing once one is below half its last bit."""
    x, weight = torch.ones(1000, 4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, weight, 0.0).sum().backward()
    torch.testing.assert_close(weight.grad.float(), torch.full((4,), 1000.0), rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_rows(name):
    operation, _, shapes = OPERATIONS[name]
    _, gradients, _ = run(operation, [(0, *shape) if len(shape) > 1 else shape for shape in shapes], torch.float32)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)
