"""Maestro against a NumPy rewrite, and what it promises."""

import numpy as np
import pytest
import torch
from driven import LR, STEPS, Adam, Network, batches, loss_and_gradients, network_with, train

from sltrain.compose import TRAIN, compose_config
from sltrain.engine.actions import Moment, Running, generator_for
from sltrain.engine.memory import tensor_peak
from sltrain.layers.ordered import OrderedLinear
from sltrain.methods.low_rank import LowRank
from sltrain.methods.maestro import Maestro, Ranks, draw


def make(**changes) -> Maestro:
    options = {"name": "maestro", "sampler": "all", "penalty": 0.5, "shrink_every": 5, "threshold": 0.2, "gain": 20.0}
    return Maestro(**options | changes)


class Rewritten:
    """One layer."""

    def __init__(self, layer: OrderedLinear) -> None:
        self.B, self.A = (factor.detach().numpy().copy() for factor in (layer.B, layer.A))
        self.adams, self.kept, self.active = (Adam(), Adam()), len(self.A), len(self.A)

    @property
    def weight(self) -> np.ndarray:
        return self.B[:, : self.active] @ self.A[: self.active]

    def update(self, grad: np.ndarray, penalty: float) -> None:
        of_B, of_A = np.zeros_like(self.B), np.zeros_like(self.A)
        of_B[:, : self.active] = grad @ self.A[: self.active].T
        of_A[: self.active] = self.B[:, : self.active].T @ grad
        for b in range(self.kept):  # the gradient of each norm, which the ranks from b on share
            of_B[:, b:] += penalty * self.B[:, b:] / np.linalg.norm(self.B[:, b:])
            of_A[b:] += penalty * self.A[b:] / np.linalg.norm(self.A[b:])
        self.B -= self.adams[0].step(of_B, LR)
        self.A -= self.adams[1].step(of_A, LR)

    def cut(self, threshold: float) -> None:
        norms = [np.linalg.norm(self.A[b:]) * np.linalg.norm(self.B[:, b:]) for b in range(self.kept)]
        self.kept = next((b for b, norm in enumerate(norms) if norm < threshold), self.kept)


def test_twenty_updates_are_those_of_the_paper() -> None:
    """With drawn ranks, the penalty and four cuts, of which some cut; equal to 1e-9, all in float64."""
    method = make()
    network = network_with(method)
    layers = [network.one, network.two]
    rewritten = [Rewritten(layer) for layer in layers]
    expected, actives = [], set()

    def follow(step: int) -> None:
        x, target = (part.numpy() for part in batches()[step - 1])
        loss, *grads = loss_and_gradients(*(layer.weight for layer in rewritten), x, target)
        expected.append(loss)
        for layer, mine, grad in zip(layers, rewritten, grads, strict=True):
            mine.update(grad, method.penalty)
            if step % 5 == 0:
                mine.cut(method.threshold)
            mine.B[:, mine.kept :], mine.A[mine.kept :] = 0, 0
            assert layer.kept == mine.kept and 1 <= layer.active <= mine.kept
            mine.active = layer.active  # drawn
            actives.add((layer is network.one, layer.active))
            np.testing.assert_allclose(layer.dense_weight(), mine.B @ mine.A, atol=1e-9)

    losses = train(method, network, see=follow)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert all(0 < layer.kept < layer.rank for layer in layers) and len(actives) > 6


def test_without_drawing_penalty_and_cuts_it_is_low_rank_bit_for_bit() -> None:
    ends = []
    for method in (
        make(max_rank=4, sampler="none", penalty=0.0, shrink_every=0),
        make(max_rank=4, sampler="none", penalty=0.0, shrink_every=STEPS + 1),
        LowRank(name="low_rank", rank=4, alpha=4.0, gain=20.0),
    ):
        network = network_with(method)
        train(method, network)
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], end[name]) for name in ends[0] for end in ends[1:])


def test_evaluation_uses_all_ranks_that_are_left() -> None:
    layer = OrderedLinear(12, 9, 6, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 12)
    layer.kept, layer.active = 4, 2
    torch.testing.assert_close(layer(x), x @ (layer.B[:, :2] @ layer.A[:2]).t())
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.B[:, :4] @ layer.A[:4]).t())
    layer.clear_cut()
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().t())


def test_a_layer_without_ranks_gives_zeros_and_can_be_drawn() -> None:
    layer = OrderedLinear(12, 9, 6, 6)
    layer.shrink(threshold=1e9)
    for sampler in ("one", "all", "none"):
        draw([layer], sampler, torch.Generator())
        assert layer.kept == layer.active == 0
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    layer.add_penalty(1.0)
    assert not y.any() and layer.A.grad is not None and not layer.A.grad.any()


@pytest.mark.parametrize("sampler", ["one", "all"])
def test_ranks_are_drawn_uniformly(sampler: str) -> None:
    """one: each pair of a layer and a rank is as likely as any; all: each rank of each layer."""
    layers = [OrderedLinear(4, 4, 4, 4), OrderedLinear(4, 4, 2, 2)]
    counts = torch.zeros(2, 5)
    for step in range(3000):
        draw(layers, sampler, generator_for(0, "ranks", step))
        for number, layer in enumerate(layers):
            counts[number, layer.active] += 1 / 3000
    one = torch.tensor([[0, 1, 1, 1, 3], [0, 1, 5, 0, 0]]) / 6
    all_ = torch.tensor([[0, 1, 1, 1, 1], [0, 2, 2, 0, 0]]) / 4
    torch.testing.assert_close(counts, one if sampler == "one" else all_, atol=0.03, rtol=0)


def test_what_is_saved_rebuilds_the_ranks() -> None:
    layers = {"a": OrderedLinear(4, 4, 4, 4), "b": OrderedLinear(4, 4, 4, 4)}
    layers["a"].kept, layers["b"].active = 3, 2
    fresh = {name: OrderedLinear(4, 4, 4, 4) for name in layers}
    Ranks(fresh).load_state_dict(Ranks(layers).state_dict())
    assert [(layer.kept, layer.active) for layer in fresh.values()] == [(3, 4), (4, 2)]


def test_the_arithmetic_is_that_of_the_ranks_that_are_left() -> None:
    layer = OrderedLinear(12, 9, 6, 6)
    assert layer.multiply_adds() == 6 * (12 + 9)
    layer.kept = 2
    assert layer.multiply_adds() == 2 * (12 + 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_memory_is_planned(dtype: torch.dtype, penalty: float) -> None:
    """Of the penalty, and of looking for ranks to cut, both to a few kilobytes."""
    network = Network().to(dtype)
    network.two = torch.nn.Linear(200, 300, bias=False, dtype=dtype)
    method = make(penalty=penalty, shrink_every=1, threshold=0.0)
    method.replace(network, lambda name, linear: True)
    action = method.actions(Running(network, 8))[0]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert (action.before is None) == (penalty == 0) == (action.before_bytes == 0)
    moment = Moment(1, torch.Generator())
    for run, planned in ((action.before, action.before_bytes), (lambda: action.apply(moment), action.temporary_bytes)):
        if run is not None:
            with torch.no_grad():
                _, measured = tensor_peak(run, 0, torch.device("cpu"))
            assert planned <= measured <= planned + 15_000


def test_parameters_by_formula() -> None:
    network = network_with(make(rank_overrides={"two": 3}))
    assert [layer.num_trained for layer in (network.one, network.two)] == [9 * (12 + 9), 3 * (9 + 7)]
    assert network.one.kind == "low_rank"  # an export is one of a low-rank layer


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["method.max_rank=0"], "method.max_rank=0: must be at least 1"),
        (["method.sampler=some"], "method.sampler=some: choose one of one, all, none"),
        (["method.penalty=-1"], "method.penalty=-1.0: must be at least 0"),
        (["method.shrink_every=-1"], "method.shrink_every=-1: must be at least 0"),
        (["ema=0.9"], "ema=0.9 averages each tensor by itself, and method=maestro cuts ranks, .*; set ema=null"),
        (["per_layer_update=true", "grad_clip=null"], "method=maestro acts between .* set per_layer_update=false"),
    ],
)
def test_refused_in_one_line(typed: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compose_config(["model=llama_tiny", "method=maestro", *typed], TRAIN)
