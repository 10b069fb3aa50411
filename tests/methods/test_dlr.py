"""method=dlr, and the same residual in method=sltrain: runs written anew in float64, and the layers that they fold
into."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.layers import CoLALinear, LowRankLinear, SLTrainLinear
from sltrain.layers.kinds.dlr import DLRLinear
from sltrain.methods.dlr import DLR

SHAPES = [(24, 40, 7), (40, 24, 7), (24, 40, 6), (40, 24, 24), (24, 40, 1)]  # out, in, rank


def expansion(out: int, rank: int, residual: float) -> Tensor:
    """residual / sqrt(K) Expand as a matrix (out, rank) of zeros and that number."""
    times = int(np.ceil(out / rank))
    return torch.from_numpy(residual / np.sqrt(times) * np.kron(np.eye(rank), np.ones((times, 1)))[:out])


class WrittenOut(nn.Module):
    """Expand is a matrix of zeros and ones here."""

    def __init__(self, own: Weights, activation: str) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(own["A"].clone()), nn.Parameter(own["B"].clone())
        self.activation, self.residual = activation, expansion(*self.B.shape, 0.8)

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
    layer = DLRLinear(40, 24, 7, activation, residual=0.0, generator=torch.Generator().manual_seed(1))
    other = CoLALinear(40, 24, 7, activation, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("rank", [5, 10])
def test_gradients_are_those_of_autograd(activation: str, rank: int) -> None:
    layer = DLRLinear(12, 21, rank, activation, residual=0.9, bias=True, dtype=torch.float64)
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


class BesideS(nn.Module):
    """SLTrain's W with the residual, dense; S is a matrix whose gradient a mask cuts."""

    def __init__(self, own: Weights, layer: SLTrainLinear) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(own["A"].clone()), nn.Parameter(own["B"].clone()), layer.scale
        positions = layer.support.positions(own["indices"]).long()
        flat = torch.zeros(layer.support.num_entries, dtype=torch.float64)
        self.mask = flat.index_fill(0, positions, 1).view(len(self.B), -1)
        self.S = nn.Parameter(flat.index_put((positions,), own["values"]).view(len(self.B), -1))
        self.residual = expansion(*self.B.shape, 0.8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.scale * self.B @ self.A + self.residual @ self.A + self.S * self.mask).t()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["composed", "factored"])
def test_twenty_updates_of_sltrain_with_it_are_those_of_a_rewrite_in_float64(
    path: str, tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    options = ["method=sltrain", "rank=7", "sparsity=0.1", "method.residual=0.8", f"layer_path={path}"]
    overrides = [*tiny, *options, "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    model = build_model(compose_config(overrides, TRAIN), 512, torch.float32)
    theirs = rewrite(overrides, run, lambda name, own: BesideS(own, model.get_submodule(name)))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


def with_residual(out_features: int, in_features: int, rank: int, residual: float = 1.3) -> SLTrainLinear:
    """A layer in float64 whose B is not zero."""
    own = {"bias": True, "dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    layer = SLTrainLinear(in_features, out_features, rank, 0.1, 5.0, residual=residual, **own)
    nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("path", SLTrainLinear.PATHS)
@pytest.mark.parametrize(("out_features", "in_features", "rank"), SHAPES)
def test_in_sltrain_it_folds_into_b(path: str, out_features: int, in_features: int, rank: int) -> None:
    layer = with_residual(out_features, in_features, rank)
    layer.path = path
    folded = with_residual(out_features, in_features, rank, 0.0)
    folded.load_state_dict({**layer.state_dict(), "B": layer.folded()})
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), folded(x))
    for found in (layer.dense_weight(), sum(part.dense() for part in layer.parts().values())):
        torch.testing.assert_close(found, folded.dense_weight())
    beside = layer.dense_weight() - with_residual(out_features, in_features, rank, 0.0).dense_weight()
    torch.testing.assert_close(beside, expansion(out_features, rank, 1.3) @ layer.A.detach())
    assert layer.num_trained == folded.num_trained and layer.multiply_adds() == folded.multiply_adds()
    assert layer.settings() == {**folded.settings(), "residual": 1.3}


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [SHAPES[0], SHAPES[2]])
def test_balanced_factors_keep_w_with_it(out_features: int, in_features: int, rank: int) -> None:
    layer = with_residual(out_features, in_features, rank)
    before, A = layer.dense_weight(), layer.A.detach().clone()
    layer.balance()
    torch.testing.assert_close(layer.dense_weight(), before)
    torch.testing.assert_close(layer.A @ layer.A.t(), layer.folded().t() @ layer.folded())
    assert not torch.allclose(layer.A, A)


def test_from_a_dense_matrix_s_holds_what_the_product_with_it_leaves() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    layer = SLTrainLinear.from_dense(weight, rank=6, sparsity=0.2, alpha=3.0, residual=1.3)
    plain = SLTrainLinear.from_dense(weight, rank=6, sparsity=0.0, alpha=3.0)
    positions = layer.support.positions(layer.indices).long()
    wanted = plain.dense_weight().flatten()
    wanted[positions] = weight.flatten()[positions]
    torch.testing.assert_close(layer.dense_weight().flatten(), wanted, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["method.residual=nan"], "method.residual=nan: must be a number"),
        (
            ["method.residual=1", "rank=0"],
            "method.residual=1 repeats the numbers of A x, and with rank=0 there are none",
        ),
    ],
)
def test_sltrain_refuses_it_in_a_line(options: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compose_config(["model=llama_60m", *options], TRAIN)
