"""Weights in 8-bit codes: their rounding, the layer's products and gradients, and that it takes a byte an entry."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.affine import GROUP, CodedTensor, encode
from sltrain.benchmarks.timing import fill_zeros
from sltrain.engine.memory import bytes_of, tensor_peak
from sltrain.layers.base import Rows
from sltrain.layers.kinds.int8 import Int8Linear
from sltrain.numeric import is_stand_in

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(
    out_features: int = 24, in_features: int = 40, dtype: torch.dtype = torch.float32, **how: object
) -> Int8Linear:
    return Int8Linear(in_features, out_features, generator=torch.Generator().manual_seed(1), dtype=dtype, **how)  # type: ignore[arg-type]


def written_out(layer: Int8Linear) -> Tensor:
    """W, entry by entry, in float64."""
    steps, zeros = layer.steps.view(torch.float32).tolist(), layer.zeros.tolist()
    codes = enumerate(layer.codes.flatten().tolist())
    values = [steps[i // 256] * (code - zeros[i // 256]) for i, code in codes]
    return torch.tensor(values, dtype=torch.float64).view(layer.codes.shape)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_rounding_at_random_is_right_on_average_at_the_ends_of_a_group_too(shift: float) -> None:
    """4000 draws of one group: a mean is within 0.5 / sqrt(4000) = 0.008 steps, one standard deviation."""
    values = draw(GROUP) + shift
    values[7] = 0
    held = CodedTensor.zero(torch.empty(4000, GROUP))
    held.write(values.expand(4000, GROUP), torch.Generator().manual_seed(2))
    step = (values.max().clamp_min(0) - values.min().clamp_max(0)) / 254
    found = held.read()
    assert (found - values).abs().max() < 1.001 * step  # one of two neighbours
    assert (found.mean(0) - values).abs().max() < 0.05 * step
    assert not found[:, 7].any()  # zero is zero
    again = CodedTensor.zero(torch.empty(4000, GROUP))
    again.write(values.expand(4000, GROUP), torch.Generator().manual_seed(2))
    assert torch.equal(again.codes, held.codes)


def test_what_is_held_is_not_moved_by_writing_it_again() -> None:
    """Once the ends of each group lie on codes that are 254 apart; before, each rounding is right on average."""
    held, generator = CodedTensor.zero(torch.empty(30, 17)), torch.Generator().manual_seed(3)
    for _ in range(50):
        held.write(held.read() if held.codes.any() else draw(30, 17), generator)
    before = held.read()
    held.write(before, generator)
    torch.testing.assert_close(held.read(), before, rtol=1e-5, atol=1e-7)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(50, 33)
    whole, cut = (CodedTensor.zero(values) for _ in range(2))
    whole.write(values)
    monkeypatch.setattr("sltrain.affine.PIECE", 2 * GROUP)
    cut.write(values)
    assert all(torch.equal(getattr(whole, name), getattr(cut, name)) for name in ("codes", "steps", "zeros"))
    assert torch.equal(cut.read().flatten(), whole.read().flatten())
    assert torch.equal(whole.codes.flatten(), encode(values, 8).codes)


@pytest.mark.parametrize("sides", [(24, 40), (13, 21), (32, 32)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_the_decoded_matrix(sides: tuple[int, int], bias: bool) -> None:
    layer = make(*sides, dtype=torch.float64, bias=bias)
    weight = written_out(layer).requires_grad_()
    x = draw(3, 5, sides[1], seed=4).double().requires_grad_()
    y, dy = layer(x), draw(3, 5, sides[0], seed=5).double()
    expected = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(y, expected)
    parameters = [layer.bias] if bias else []
    ours = torch.autograd.grad(y, [x, layer.weight, *parameters], dy)
    theirs = torch.autograd.grad(expected, [x, weight, *parameters], dy)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)
    torch.testing.assert_close(layer.dense_weight(), weight.detach())
    torch.testing.assert_close(layer.parts()["W"].norm().double(), weight.detach().norm(), rtol=1e-6, atol=0)


def test_a_bfloat16_input_gets_a_bfloat16_product_under_autocast() -> None:
    layer, x = make(), draw(8, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ layer.dense_weight().t(), rtol=0.02, atol=0.02)


def test_it_starts_as_a_dense_layer_up_to_half_a_step() -> None:
    layer, dense = make(init_std=0.02), torch.empty(24, 40)
    dense.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    error = (layer.dense_weight() - dense).abs().max()
    assert 0 < error <= 0.51 * layer.steps.view(torch.float32).max()


@pytest.mark.parametrize("sides", [(64, 128), (13, 21)])
def test_it_takes_a_byte_an_entry(sides: tuple[int, int]) -> None:
    """On the meta device, once it has memory, after a cast and in a copy."""
    numel = sides[0] * sides[1]
    expected = numel + 5 * -(-numel // 256)
    layer = make(*sides, device="meta").to_empty(device="cpu")
    assert not layer.weight.any()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert is_stand_in(layer.weight) and layer.weight.shape == sides
        assert 0 <= bytes_of([*layer.parameters(), *layer.buffers()]) - expected <= 4
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict(), assign=True)
    assert is_stand_in(again.weight) and torch.equal(again.codes, layer.codes)


def test_its_state_is_the_codes() -> None:
    first, second = make(), make()
    first.set_weight(draw(24, 40, seed=6))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.dense_weight(), first.dense_weight())
    assert first.state_dict()["weight"].shape == () and list(first.state_dict()) == list(second.state_dict())
    with pytest.raises(RuntimeError, match="memory location"):  # an optimizer that knows of no codes changes nothing
        first.weight.grad = torch.ones(24, 40)
        torch.optim.SGD([first.weight], lr=1.0, foreach=False).step()


def test_a_benchmark_counts_its_bytes_and_leaves_its_values_alone() -> None:
    layer = make()
    before = layer.dense_weight()
    fill_zeros(layer)
    assert torch.equal(layer.dense_weight(), before)
    assert bytes_of([*layer.parameters(), *layer.buffers()]) == 24 * 40 + 5 * 4 + 4


def test_temporaries_are_a_bound() -> None:
    layer = make(384, 256)
    x = draw(16, 256).requires_grad_()
    said = layer.footprint(Rows(16, 4, has_kernel=False))
    y = layer(x)
    dy = torch.ones_like(y)
    _, peak = tensor_peak(lambda: torch.autograd.backward(y, dy), 0, CPU)
    assert said.kept == 0 and said.gradients == 4 * 384 * 256
    assert peak <= said.temporary + said.gradients + x.nbytes + 4096
    assert peak >= 0.9 * (said.temporary + said.gradients)


def test_it_stands_in_a_network_of_any_kind() -> None:
    from sltrain.layers.convert import merge_to_dense

    network = nn.Sequential(make(), nn.ReLU(), make(40, 24))
    x = draw(4, 40)
    before = network(x)
    assert merge_to_dense(network) == ["0", "2"] and type(network[0]) is nn.Linear
    torch.testing.assert_close(network(x), before)
