"""method=gradnorm_lorp: the same run written anew in float64, its start against that of method=full, and gradients."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from driven import batches, network_with
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.layers.kinds.gradnorm_lorp import GradNormLoRPLinear
from sltrain.methods.gradnorm_lorp import GradNormLoRP
from sltrain.optim.build import build_optimizer
from sltrain.optim.kinds.galore import GaLore
from sltrain.planning.accounting import count_parameters
from sltrain.planning.roles import parameters_of

SHAPES = [(24, 40), (40, 24), (13, 21)]  # (out, in)


class WrittenOut(nn.Module):
    """Plain autograd through the norms."""

    def __init__(self, own: Weights, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.m = (nn.Parameter(own[name].clone()) for name in "ABm")
        self.W0, self.scale = own["W0"], scale

    def forward(self, x: Tensor) -> Tensor:
        V = self.W0 + self.scale * self.B @ self.A
        return x @ (V / V.square().sum(1, keepdim=True).sqrt()).t() * self.m


def moved(out_features: int, in_features: int, **options: object) -> GradNormLoRPLinear:
    """A layer in float64 that has left its start."""
    draw = torch.Generator().manual_seed(3)
    layer = GradNormLoRPLinear(in_features, out_features, 4, 8.0, generator=draw, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.B.copy_(torch.randn(out_features, 4, generator=draw))
        layer.m.copy_(torch.randn(out_features, generator=draw))  # of either sign
    return layer


@pytest.mark.slow
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs; all three of m, A and B move far."""
    overrides = [*tiny, "method=gradnorm_lorp", "alpha=16", "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    theirs = rewrite(overrides, run, lambda name, own: WrittenOut(own, 16 / 8))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5
    name, after = "model.layers.1.mlp.down_proj", run.saved(20)
    for leaf, least in {"A": 0.05, "B": 0.05, "m": 0.02}.items():
        assert (after[f"{name}.{leaf}"] - run.start[f"{name}.{leaf}"]).abs().max() > least
    assert torch.equal(after[f"{name}.W0"], run.start[f"{name}.W0"])


def test_the_start_is_that_of_full_bit_for_bit(tiny: list[str]) -> None:
    dense, ours = (
        build_model(compose_config([*tiny, f"method={name}"], TRAIN), 512, torch.float32).to_empty(device="cpu")
        for name in ("full", "gradnorm_lorp")
    )
    for model in (dense, ours):
        model.init_weights(seed=5)
    ids = torch.arange(32).view(1, 32)
    assert torch.equal(ours(ids), dense(ids))
    up = ours.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(up, GradNormLoRPLinear) and torch.equal(up.dense_weight(), up.W0)
    counts = count_parameters(ours)
    sides = 2 * (4 * [(32, 32)] + 3 * [(32, 64)])
    assert counts["low_rank"] == sum(8 * (one + other) for one, other in sides)
    assert counts["magnitude"] == 2 * (4 * 32 + 2 * 64 + 32)
    assert counts["frozen"] == sum(one * other for one, other in sides)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_autograd(shape: tuple[int, int]) -> None:
    layer = moved(*shape, bias=True)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    trained = [layer.A, layer.B, layer.m, layer.bias]
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *trained))
    torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_its_part_is_the_matrix_of_the_formula(shape: tuple[int, int]) -> None:
    layer = moved(*shape)
    V, m = (layer.W0 + 2 * layer.B @ layer.A).detach().numpy(), layer.m.detach().numpy()
    wanted = m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    part = layer.parts()["W"]
    np.testing.assert_allclose(part.dense().numpy(), wanted, rtol=1e-12)
    assert float(part.norm()) == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    np.testing.assert_allclose(part.singular_values().numpy(), np.linalg.svd(wanted, compute_uv=False), rtol=1e-9)
    assert layer.num_trained == 4 * sum(shape) + shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_a_dense_matrix_it_is_the_matrix(dtype: torch.dtype) -> None:
    """Bit for bit where m has the precision of the norms. A row of zeros stays one, and breaks nothing."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[5] = 0
    layer = GradNormLoRPLinear.from_dense(weight, rank=4, alpha=8.0)
    found = layer.dense_weight()
    assert found.dtype == dtype and not found[5].any()
    if dtype == torch.float32:
        assert torch.equal(found, weight)
    torch.testing.assert_close(found, weight, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)
    layer(torch.ones(2, 40, dtype=dtype)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (layer.A, layer.B, layer.m))


def test_under_autocast_every_gradient_has_the_dtype_of_its_tensor() -> None:
    layer = moved(24, 40).float()
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.03)
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in (x, layer.A, layer.B, layer.m) if tensor.grad is not None} == {
        torch.float32
    }


def test_galore_projects_the_gradients_of_a_and_b() -> None:
    """Not of m, which goes to the optimizer of the others; with a rank that is not below theirs of neither."""
    network = network_with(GradNormLoRP("gradnorm_lorp", rank=4, alpha=8.0))
    infos = parameters_of(network)
    assert {info.role for name, info in infos.items() if name.endswith(".m")} == {"values"}
    taken = {rank: [name for name in infos if GaLore("galore", rank=rank).takes(infos[name])] for rank in (2, 4)}
    assert taken == {2: ["one.A", "one.B", "two.A", "two.B"], 4: []}
    options = GaLore("galore", rank=2, update_every=5)
    device = torch.device("cpu")
    optimizer = build_optimizer(
        network.named_parameters(), options, lr=0.05, weight_decay=0.0, device=device, infos=infos
    )
    layer = network.one
    assert isinstance(layer, GradNormLoRPLinear)
    moves: dict[str, list[Tensor]] = {"A": [], "B": [], "m": []}
    for x, target in batches(15):
        before = {leaf: layer.get_parameter(leaf).detach().clone() for leaf in moves}
        network(x, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        for leaf, steps in moves.items():
            steps.append(layer.get_parameter(leaf).detach() - before[leaf])
    own, rank = torch.linalg.matrix_rank, {"tol": 1e-5}
    for steps in (moves["B"], [step.t() for step in moves["A"]]):  # (out or in, 4) each
        assert [int(own(torch.cat(steps[first : first + 5]), **rank)) for first in (5, 10)] == [2, 2]
        assert int(own(torch.cat(steps), **rank)) > 2  # the directions are chosen anew
    assert int(own(torch.stack(moves["m"]), **rank)) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "method=gradnorm_lorp needs rank above 0, and rank is 0"),
        ({"rank_overrides": {"q_proj": 0}}, "method=gradnorm_lorp needs rank above 0, and q_proj is 0"),
        ({"alpha": 0.0}, "method.alpha=0.0: must be a number above 0"),
        ({"alpha": float("inf")}, "method.alpha=inf: must be a number above 0"),
    ],
)
def test_options_are_refused_in_a_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradNormLoRP("gradnorm_lorp", **{"rank": 4, "alpha": 8.0, **options}).check()


@pytest.mark.parametrize(("rank", "words"), [(0, "rank of at least 1"), (9, "rank must be between 0 and 8")])
def test_a_layer_refuses_what_it_cannot_be(rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradNormLoRPLinear(8, 8, rank, 8.0)
