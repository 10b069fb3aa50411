"""Sparse Spectral Training against a NumPy rewrite of its algorithm 1, and what it promises."""

import numpy as np
import pytest
import torch
from driven import LR, STEPS, Adam, Network, batches, loss_and_gradients, network_with, train

from sltrain.compose import TRAIN, compose_config
from sltrain.engine.memory import tensor_peak
from sltrain.layers.kinds.sst import SpectralLinear
from sltrain.methods.sst import SST


def make(**changes) -> SST:
    return SST(**{"name": "sst", "rank": 3, "select_every": 2, "iterations": 3, "restart_warmup": 2} | changes)


class Rewritten:
    """One layer, in the paper's notation: all of U (out, m) and V (in, m), of which the columns I are trained. Which
    they are is drawn, and comes from the layer that is tested."""

    def __init__(self, layer: SpectralLinear) -> None:
        order = layer.order.numpy()
        self.U, self.V = np.empty((layer.out_features, len(order))), np.empty((layer.in_features, len(order)))
        self.U[:, order] = torch.cat([layer.U, layer.U_rest], 1).detach().numpy()
        self.V[:, order] = torch.cat([layer.V, layer.V_rest]).t().detach().numpy()
        self.s = layer.s.detach().numpy().copy()
        self.adam_U, self.adam_V, self.adam_s = Adam(), Adam(), Adam()
        self.draw(layer)

    def draw(self, layer: SpectralLinear) -> None:
        self.I = layer.order[: layer.rank].numpy().copy()
        self.adam_U.reset()
        self.adam_V.reset()

    @property
    def weight(self) -> np.ndarray:
        return self.U @ np.diag(self.s) @ self.V.T

    def update(self, grad: np.ndarray, lr: float) -> None:
        of_s = np.diag(self.U.T @ grad @ self.V)
        U, V = self.U[:, self.I], self.V[:, self.I]
        new_U = U - self.adam_U.step(grad @ V, lr)
        new_V = V - self.adam_V.step(grad.T @ U, lr)
        self.s = np.maximum(self.s - self.adam_s.step(of_s, lr), 0)
        self.U[:, self.I] = new_U / np.linalg.norm(new_U, axis=0)
        self.V[:, self.I] = new_V / np.linalg.norm(new_V, axis=0)

    def decompose(self) -> None:
        self.U, self.s, right = np.linalg.svd(self.weight, full_matrices=False)
        self.V = right.T
        self.adam_s.reset()


@pytest.mark.parametrize("reaches_zero", [False, True])
def test_twenty_updates_are_those_of_the_paper(reaches_zero: bool) -> None:
    """Three rounds; or none, with singular values that reach 0, whose vectors a decomposition may choose. Equal to
    1e-9, all in float64."""
    method = make(gain=30.0, iterations=100 if reaches_zero else 3)
    network = network_with(method)
    if reaches_zero:
        with torch.no_grad():
            network.one.s[-2:] = 1e-3
    rewritten = {name: Rewritten(network.get_submodule(name)) for name in ("one", "two")}
    expected, clamped = [], []

    def follow(step: int) -> None:
        one, two = rewritten["one"], rewritten["two"]
        x, target = (part.numpy() for part in batches()[step - 1])
        loss, *grads = loss_and_gradients(one.weight, two.weight, x, target)
        expected.append(loss)
        warmup = 0.5 if step > 2 and step % 2 == 1 else 1.0
        for layer, grad in zip((one, two), grads, strict=True):
            layer.update(grad, LR * warmup)
        clamped.append(one.s.min() == 0)
        for name, layer in rewritten.items():
            if step % 6 == 0 and not reaches_zero:
                layer.decompose()
            if step % 2 == 0:
                layer.draw(network.get_submodule(name))
            np.testing.assert_allclose(network.get_submodule(name).dense_weight(), layer.weight, atol=1e-9)

    losses = train(method, network, see=follow)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert losses[-1] < losses[0] and any(clamped) == reaches_zero


@pytest.mark.parametrize("sides", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("what", ["select", "decompose"])
def test_the_function_stays(sides: tuple[int, int], what: str) -> None:
    torch.manual_seed(0)
    layer = SpectralLinear(*sides, rank=6)
    with torch.no_grad():
        layer.U.add_(torch.randn_like(layer.U), alpha=0.1)  # as training leaves them: not orthogonal
        layer.V.add_(torch.randn_like(layer.V), alpha=0.1)
    x, before = torch.randn(20, sides[0]), layer.dense_weight()
    y, order = layer(x), layer.order.clone()
    layer.select(torch.Generator().manual_seed(5)) if what == "select" else layer.decompose()
    assert not torch.equal(layer.order, order)
    for found, was in ((layer(x), y), (layer.dense_weight(), before)):
        assert (found - was).norm() <= 1e-6 * was.norm()
    if what == "decompose":
        gram = torch.cat([layer.U, layer.U_rest], 1)
        torch.testing.assert_close(gram.t() @ gram, torch.eye(layer.full_rank), atol=1e-5, rtol=0)


def test_vectors_are_drawn_with_the_weights_of_the_paper() -> None:
    """With one vector a draw, how often each comes is its probability; section 4.4."""
    layer = SpectralLinear(6, 5, rank=1)
    with torch.no_grad():
        layer.s.copy_(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0]))
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(5)
    for _ in range(4000):
        layer.select(generator)
        counts[layer.order[0]] += 1
    torch.testing.assert_close(counts / 4000, (1 / 5 + layer.s.detach() / 8) / 2, atol=0.02, rtol=0)


def test_never_selecting_is_a_longer_interval_than_the_run() -> None:
    ends = []
    for method in (make(select_every=0), make(select_every=STEPS + 1)):
        network = network_with(method)
        order = network.one.order.clone()
        train(method, network)
        assert torch.equal(network.one.order, order)
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_parameters_by_formula() -> None:
    layer = SpectralLinear(40, 24, rank=6)
    assert layer.num_trained == 6 * (40 + 24) + 24
    assert sum(p.numel() for p in layer.parameters()) == 24 * (40 + 24) + 24
    assert layer.multiply_adds() == 24 * (40 + 24)


@pytest.mark.parametrize("sides", [(384, 384), (256, 768), (768, 256)])
def test_memory_of_a_selection_is_planned(sides: tuple[int, int]) -> None:
    layer = SpectralLinear(*sides, rank=16)

    def end_round() -> None:
        layer.decompose()
        layer.select(None)

    _, measured = tensor_peak(end_round, 0, torch.device("cpu"))
    assert measured == pytest.approx(layer.select_bytes, rel=0.02)


def test_a_dense_matrix_is_taken_whole() -> None:
    weight, bias = torch.randn(24, 40), torch.randn(24)
    layer = SpectralLinear.from_dense(weight, bias=bias, rank=6)
    torch.testing.assert_close(layer.dense_weight(), weight, atol=1e-5, rtol=0)
    x = torch.randn(3, 2, 40)
    torch.testing.assert_close(layer(x), x @ weight.t() + bias, atol=1e-5, rtol=1e-5)


def test_the_start_is_that_of_a_dense_matrix() -> None:
    method = make(rank=4, gain=0.5)
    network = Network()
    network.config = type("Shape", (), {"initializer_range": 0.6})()
    method.replace(network, lambda name, linear: True)
    assert network.one.dense_weight().std().item() == pytest.approx(0.3, rel=0.1)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_that_of_the_weights() -> None:
    layer = SpectralLinear(16, 12, rank=4, bias=True)
    x = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.U.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(5, 16), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["rank=0"], "method=sst needs rank above 0, and rank is 0"),
        (["method.select_every=-1"], "method.select_every=-1: must be at least 0"),
        (["method.iterations=0"], "method.iterations=0: must be at least 1"),
        (["method.select_every=5"], "method.restart_warmup=20: must be at most method.select_every=5"),
        (["method.gain=0"], "method.gain=0.0: must be a number above 0"),
        (["ema=0.9"], "ema=0.9 averages each tensor by itself, and method=sst exchanges"),
    ],
)
def test_refused_in_one_line(typed: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compose_config(["model=llama_tiny", "method=sst", *typed], TRAIN)
