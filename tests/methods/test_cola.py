"""method=cola: y = B silu(A x), against the same run written anew in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.layers import CoLALinear, LowRankLinear
from sltrain.layers.activated import ACTIVATIONS, NONE
from sltrain.methods import base
from sltrain.methods.cola import CoLA


class WrittenOut(nn.Module):
    def __init__(self, own: Weights) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(own["A"].clone()), nn.Parameter(own["B"].clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.A.t()
        return (hidden / (1 + (-hidden).exp())) @ self.B.t()


@pytest.mark.slow
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    overrides = [*tiny, "method=cola", "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    theirs = rewrite(overrides, run, lambda name, own: WrittenOut(own))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


def test_without_an_activation_it_is_the_low_rank_layer_bit_for_bit() -> None:
    layer = CoLALinear(40, 24, 6, activation="none", bias=True)
    other = LowRankLinear(40, 24, 6, alpha=6, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), other(x)) and torch.equal(layer.dense_weight(), other.dense_weight())
    for one in (layer, other):
        one(x).square().sum().backward()
    pairs = zip(layer.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine.grad, theirs.grad) for mine, theirs in pairs)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, NONE])
def test_gradients_are_those_of_autograd(activation: str) -> None:
    layer = CoLALinear(12, 20, 4, activation, bias=True, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *layer.parameters()))


def test_the_start_has_the_variance_of_the_authors() -> None:
    layer = CoLALinear(400, 600, 100, generator=torch.Generator().manual_seed(0))
    assert layer.A.std().item() == pytest.approx(100_000**-0.25, rel=0.02)
    assert (layer.B @ layer.A).var().item() == pytest.approx(1 / 1000, rel=0.05)


def test_there_is_no_one_matrix_and_no_start_from_one() -> None:
    layer = CoLALinear(12, 20, 4)
    assert layer.num_trained == layer.multiply_adds() == 4 * (12 + 20)
    with pytest.raises(ValueError, match="a layer of kind cola is not one matrix"):
        layer.dense_weight()
    with pytest.raises(ValueError, match="kind cola cannot start from a dense matrix"):
        CoLALinear.from_dense(torch.eye(8), rank=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "method=cola needs rank above 0, and rank is 0"),
        ({"rank": 4, "rank_overrides": {"q_proj": 0}}, "needs rank above 0, and q_proj is 0"),
        ({"rank": 4, "activation": "tanh"}, "method.activation=tanh: choose one of silu, gelu, relu, none"),
    ],
)
def test_options_are_refused_in_a_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CoLA("cola", **options).check()


def test_a_layer_refuses_what_it_cannot_be() -> None:
    for arguments, words in (((8, 8, 0), "rank of at least 1"), ((8, 8, 2, "tanh"), "choose one of silu")):
        with pytest.raises(ValueError, match=words):
            CoLALinear(*arguments)
    assert base.ACTIVATIONS == (*ACTIVATIONS, NONE)
