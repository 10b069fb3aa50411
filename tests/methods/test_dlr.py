"""method=dlr: the same run written anew in float64, and the low-rank layer that it folds into."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.layers import CoLALinear, LowRankLinear
from sltrain.layers.kinds.dlr import DLRLinear
from sltrain.methods.dlr import DLR

SHAPES = [(24, 40, 7), (40, 24, 7), (24, 40, 6), (40, 24, 24), (24, 40, 1)]  # out, in, rank


class WrittenOut(nn.Module):
    """Expand is a matrix of zeros and ones here."""

    def __init__(self, own: Weights, activation: str) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(own["A"].clone()), nn.Parameter(own["B"].clone())
        self.activation, (out, rank) = activation, self.B.shape
        times = int(np.ceil(out / rank))
        R = np.kron(np.eye(rank), np.ones((times, 1)))[:out]
        self.residual = torch.from_numpy(0.8 / np.sqrt(times) * R)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.A.t()
        z = z * z.sigmoid() if self.activation == "silu" else z
        return z @ self.B.t() + z @ self.residual.t()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    activation: str, tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    options = ["method=dlr", "rank=7", "method.residual=0.8", f"method.activation={activation}"]
    overrides = [*tiny, *options, "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    theirs = rewrite(overrides, run, lambda name, own: WrittenOut(own, activation))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


@pytest.mark.parametrize(("out_features", "in_features", "rank"), SHAPES)
def test_it_folds_into_b(out_features: int, in_features: int, rank: int) -> None:
    layer = DLRLinear(in_features, out_features, rank, residual=1.3, bias=True, dtype=torch.float64)
    folded = LowRankLinear(in_features, out_features, rank, alpha=rank, bias=True, dtype=torch.float64)
    folded.load_state_dict({**layer.state_dict(), "B": layer.folded()})
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), folded(x))
    torch.testing.assert_close(layer.dense_weight(), folded.dense_weight())
    assert layer.num_trained == layer.multiply_adds() == folded.num_trained
    times = -(-out_features // rank)
    assert (layer.folded() - layer.B).detach().count_nonzero(1).tolist() == [1] * out_features
    assert (layer.folded() - layer.B)[-1, (out_features - 1) // times].item() == pytest.approx(1.3 / times**0.5)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_without_the_residual_it_is_the_layer_of_kind_cola_bit_for_bit(activation: str) -> None:
    layer = DLRLinear(40, 24, 7, 0.0, activation, generator=torch.Generator().manual_seed(1))
    other = CoLALinear(40, 24, 7, activation, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("rank", [5, 10])
def test_gradients_are_those_of_autograd(activation: str, rank: int) -> None:
    layer = DLRLinear(12, 21, rank, 0.9, activation, bias=True, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *layer.parameters()))


@pytest.mark.parametrize(("out_features", "in_features", "rank"), SHAPES)
def test_from_a_dense_matrix_it_is_the_nearest_of_its_rank(out_features: int, in_features: int, rank: int) -> None:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    near = (left[:, :rank] * values[:rank]) @ right[:rank]
    found = DLRLinear.from_dense(weight, rank=rank).dense_weight()
    np.testing.assert_allclose(found.numpy(), near, atol=3e-5)
    with pytest.raises(ValueError, match="kind dlr is not one matrix"):
        DLRLinear.from_dense(weight, rank=rank, activation="silu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "method=dlr needs rank above 0, and rank is 0"),
        ({"residual": float("nan")}, "method.residual=nan: must be a number"),
        ({"activation": "tanh"}, "method.activation=tanh: choose one of silu"),
    ],
)
def test_options_are_refused_in_a_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DLR("dlr", **{"rank": 4, **options}).check()


def test_a_layer_refuses_what_it_cannot_be() -> None:
    for changes, words in (({"rank": 0}, "rank of at least 1"), ({"residual": float("inf")}, "residual is inf")):
        with pytest.raises(ValueError, match=words):
            DLRLinear(8, 8, **{"rank": 2, **changes})
