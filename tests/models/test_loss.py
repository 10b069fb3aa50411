"""The chunked loss against torch's cross-entropy, and the bound on the logits it holds."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain.models.loss import (
    CHUNK_BYTES,
    MIN_CHUNK_ROWS,
    chunked_cross_entropy_sum,
    default_chunk_rows,
    keeps_logit_gradients,
)

ROWS, SIZE, VOCABULARY = 23, 8, 50
FEW_ROWS = 7  # so few that the gradient of the logits waits for backward, and not that of the weight


def make(dtype=torch.float64, ignored=0.3, rows=ROWS):
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, SIZE, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, SIZE, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (rows,), generator=source)
    labels[torch.rand(rows, generator=source) < ignored] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [1, 4, 23, 100, None])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [ROWS, FEW_ROWS])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_equals_torch_in_float64(chunk_rows, ignored, rows, z_loss):
    """The gradients with z_loss too; the value is the cross-entropy."""
    hidden, weight, labels = make(ignored=ignored, rows=rows)
    loss = chunked_cross_entropy_sum(hidden, weight, labels, chunk_rows, z_loss)
    expected = reference(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    expected = expected + z_loss * ((hidden @ weight.t()).logsumexp(1).square() * (labels != -100)).sum()
    gradients = torch.autograd.grad(0.37 * loss, (hidden, weight))
    for gradient, exact in zip(gradients, torch.autograd.grad(0.37 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [ROWS, FEW_ROWS])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen, rows):
    hidden, weight, labels = make(rows=rows)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    chunked_cross_entropy_sum(hidden, weight, labels, 4).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    reference(hidden, weight, labels).backward()
    for gradient, tensor in zip(gradients, (hidden, weight), strict=True):
        assert (gradient is None) == (tensor.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, tensor.grad)


class Recorder(TorchDispatchMode):
    """Largest number of rows of any (rows, VOCABULARY) tensor made, and how often each operation ran."""

    def __init__(self):
        super().__init__()
        self.rows, self.calls = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket] += 1
        if isinstance(result, torch.Tensor) and result.shape[1:] == (VOCABULARY,):
            self.rows = max(self.rows, result.shape[0])
        return result


@pytest.mark.parametrize("chunk_rows", [4, 10])
def test_never_more_than_a_chunk_of_logits(chunk_rows):
    hidden, weight, labels = make(dtype=torch.float32, ignored=0.0)
    with Recorder() as recorder:
        chunked_cross_entropy_sum(hidden, weight, labels, chunk_rows).backward()
    # weight^T, a view of (SIZE, VOCABULARY), is the one other tensor of that width.
    assert recorder.rows == max(chunk_rows, SIZE)
    products = recorder.calls[torch.ops.aten.mm] + recorder.calls[torch.ops.aten.addmm_]
    assert products == 3 * -(-ROWS // chunk_rows)


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, labels = make(dtype=torch.float32, ignored=0.0)
    with torch.no_grad(), Recorder() as recorder:
        loss = chunked_cross_entropy_sum(hidden, weight, labels, 10)
    assert recorder.calls[torch.ops.aten.mm] == 3 and not loss.requires_grad
    assert recorder.calls[torch.ops.aten.exp_] == 0  # no softmax
    torch.testing.assert_close(loss, reference(hidden, weight, labels).detach())


@pytest.mark.parametrize("rows", [ROWS, FEW_ROWS, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smaller_gradient_waits_for_backward(rows, dtype):
    hidden, weight, labels = make(dtype, ignored=0.0, rows=rows)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        chunked_cross_entropy_sum(hidden, weight, labels)
    of_logits, of_weight = (rows, VOCABULARY), (VOCABULARY, SIZE)
    expected = of_logits if keeps_logit_gradients(rows, SIZE, *2 * [hidden.element_size()]) else of_weight
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape in (of_logits, of_weight)] == [expected]
    assert {True: of_logits, False: of_weight}[
        rows <= FEW_ROWS or (rows == ROWS and dtype == torch.bfloat16)
    ] == expected


@pytest.mark.parametrize("rows", [ROWS, FEW_ROWS, 100])
def test_bfloat16_gives_a_float32_loss_and_bfloat16_gradients(rows):
    hidden, weight, labels = make(dtype=torch.bfloat16, rows=rows)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss, expected = chunked_cross_entropy_sum(hidden, weight, labels, 4), reference(*exact, labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=5e-3)
    (loss / 3).backward()
    (expected / 3).backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.double() - theirs.grad).norm() < 0.01 * theirs.grad.norm()


def test_many_bfloat16_chunks_are_summed_in_float32():
    """600 contributions of 1/VOCABULARY: a bfloat16 sum stops growing once they are below half its last bit."""
    hidden = torch.ones(600, SIZE, dtype=torch.bfloat16)
    weight = torch.zeros(VOCABULARY, SIZE, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy_sum(hidden, weight, torch.zeros(600, dtype=torch.int64), chunk_rows=1).backward()
    expected = torch.full((VOCABULARY - 1, SIZE), 600 / VOCABULARY)
    torch.testing.assert_close(weight.grad[1:].float(), expected, rtol=0.01, atol=0)


def test_autocast_multiplies_in_its_dtype_and_returns_float32():
    hidden, weight, labels = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy_sum(hidden, weight, labels, 4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(hidden, weight, labels).item(), rel=5e-3)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_extreme_logits_stay_finite():
    hidden, weight, labels = make(dtype=torch.float32)
    loss = chunked_cross_entropy_sum(1e4 * hidden, weight, labels, 4)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_no_rows_give_zero():
    hidden, weight, labels = make()
    loss = chunked_cross_entropy_sum(hidden[:0], weight, labels[:0])
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(weight.grad) == 0


def test_a_second_derivative_is_refused_instead_of_wrong():
    hidden, weight, labels = make()
    loss = chunked_cross_entropy_sum(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("device_type", "num_bytes"), CHUNK_BYTES.items())
def test_the_default_chunk_fills_its_budget_or_has_enough_rows(device_type, num_bytes):
    rows = default_chunk_rows(32_000, device_type)
    assert 0.99 * num_bytes < rows * 32_000 * 4 <= num_bytes
    assert default_chunk_rows(10**6, device_type) == MIN_CHUNK_ROWS
