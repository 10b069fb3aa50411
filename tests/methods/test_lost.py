"""method=lost: the same run written anew in float64, the start against NumPy's singular value decomposition, and the
layers that it equals in a limit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.kinds.lost import LOSTLinear
from sltrain.methods.lost import LOST

SHAPES = [(24, 40), (40, 24), (32, 32)]  # (out, in)


class WrittenOut(nn.Module):
    def __init__(self, own: Weights, activation: str) -> None:
        super().__init__()
        self.A, self.B, self.values = (nn.Parameter(own[name].clone()) for name in ("A", "B", "values"))
        self.columns, self.activation = own["indices"].long(), activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.A.t()
        hidden = hidden * hidden.sigmoid() if self.activation == "silu" else hidden
        return 0.7 * hidden @ self.B.t() + 0.3 * x[..., self.columns] @ self.values.view(len(self.B), -1).t()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    activation: str, tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    options = ["method=lost", "sparsity=0.1", "method.gamma=0.7", f"method.activation={activation}", "method.gain=4"]
    overrides = [*tiny, *options, "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    theirs = rewrite(overrides, run, lambda name, own: WrittenOut(own, activation))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


@pytest.mark.parametrize("complement", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_singular_value_decomposition_of_one_dense_matrix(
    shape: tuple[int, int], complement: int | None
) -> None:
    out_features, in_features = shape
    draw = torch.Generator().manual_seed(5)
    layer = LOSTLinear(
        in_features, out_features, 6, 0.15, complement=complement, generator=draw, init_std=0.3, dtype=torch.float64
    )
    dense = torch.empty(shape).normal_(0, 0.3, generator=torch.Generator().manual_seed(5)).double().numpy()
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    near = (left[:, :6] * values[:6]) @ right[:6]
    np.testing.assert_allclose((layer.B @ layer.A).detach().numpy(), near, atol=1e-4)
    sizes = [torch.linalg.svdvals(factor.detach()) for factor in (layer.A, layer.B)]
    torch.testing.assert_close(*sizes, atol=1e-4, rtol=0)  # shared evenly
    last = None if complement is None else 6 + complement
    rest = (left[:, 6:last] * values[6:last]) @ right[6:last]
    wanted = np.sort(np.argsort(-np.linalg.norm(rest, axis=0))[: round(0.15 * in_features)])
    assert layer.indices.tolist() == wanted.tolist()
    np.testing.assert_allclose(layer.values.detach().view(out_features, -1).numpy(), dense[:, wanted], atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_from_a_dense_matrix_it_is_exact_in_its_columns(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = LOSTLinear.from_dense(weight, rank=6, sparsity=0.15, gamma=0.3)
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    wanted = torch.from_numpy((left[:, :6] * values[:6]) @ right[:6]).float()
    columns = layer.indices.long()
    wanted[:, columns] = weight[:, columns]
    torch.testing.assert_close(layer.dense_weight(), wanted, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="kind lost is not one matrix"):
        LOSTLinear.from_dense(weight, rank=6, sparsity=0.15, activation="silu")


def test_without_columns_or_activation_it_is_a_known_layer() -> None:
    """With V = 0 the low-rank layer, bit for bit; otherwise SLTrain's with columns, to rounding."""
    layer = LOSTLinear(40, 24, 4, 0.1, gamma=0.5, bias=True)
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    sltrain = SLTrainLinear(40, 24, 4, 0.1, alpha=2.0, bias=True, support="column", path="factored")
    sltrain.load_state_dict({**layer.state_dict(), "values": 0.5 * layer.values.detach()})
    torch.testing.assert_close(layer(x), sltrain(x))
    torch.testing.assert_close(layer.dense_weight(), sltrain.dense_weight())
    layer.values.data.zero_()
    low_rank = LowRankLinear(40, 24, 4, alpha=2.0, bias=True)
    low_rank.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name in "AB bias"})
    assert torch.equal(layer(x), low_rank(x))
    assert layer.num_trained == layer.multiply_adds() == 4 * (40 + 24) + 4 * 24


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_are_those_of_autograd(activation: str) -> None:
    layer = LOSTLinear(12, 20, 4, 0.2, 0.6, activation, bias=True, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *layer.parameters()))
    if activation == "none":
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "method=lost needs rank above 0, and rank is 0"),
        ({"sparsity": 0.0}, "sparsity=0: method=lost needs a fraction .* without columns it is method=low_rank"),
        ({"gamma": 1.0}, "method.gamma=1: must be above 0 and below 1"),
        ({"activation": "tanh"}, "method.activation=tanh: choose one of silu"),
        ({"complement": 0}, "method.complement=0: must be at least 1"),
        ({"gain": 0.0}, "method.gain=0.0: must be a number above 0"),
    ],
)
def test_options_are_refused_in_a_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LOST("lost", **{"rank": 4, "sparsity": 0.1, **options}).check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"rank": 9}, "rank must be between 0 and 8"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"complement": 0}, "at least one singular triplet"),
        ({"activation": "tanh"}, "choose one of silu"),
        ({"sparsity": 0.01}, "trains no column of 8"),
    ],
)
def test_a_layer_refuses_what_it_cannot_be(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LOSTLinear(8, 8, **{"rank": 2, "sparsity": 0.2, **changes})
