"""LORO against a rewrite that makes the dense gradient and its projection, and what it promises."""

import numpy as np
import pytest
import torch
from driven import LR, STEPS, Adam, batches, loss_and_gradients, network_with, train

from sltrain.compose import TRAIN, compose_config
from sltrain.engine.actions import Running, Schedule
from sltrain.engine.memory import tensor_peak
from sltrain.layers.riemannian import riemannian_step, step_bytes
from sltrain.methods.loro import LORO
from sltrain.methods.low_rank import LowRank


def make(**changes) -> LORO:
    options = {"name": "loro", "rank": 3, "exact_every": 4, "lr_width": 6, "restart_warmup": 2}
    return LORO(**options | changes)


def nearest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Balanced factors of the nearest matrix of this rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def exact(B: np.ndarray, A: np.ndarray, step_B: np.ndarray, step_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equation 10 with dense matrices (out, in): pseudo-inverses of the factors give G V V^T and U U^T G."""
    right, left = step_B @ np.linalg.pinv(A).T, np.linalg.pinv(B).T @ step_A
    columns, rows = B @ np.linalg.pinv(B), np.linalg.pinv(A) @ A  # U U^T, V V^T
    one, two = np.eye(len(columns)), np.eye(len(rows))
    projected = left @ (two - rows) + (one - columns) @ right + left @ rows
    return nearest(B @ A - projected, len(A))


class Rewritten:
    """One layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.B, self.A = (factor.detach().numpy().copy() for factor in (layer.B, layer.A))
        self.adams = Adam(), Adam()

    def update(self, grad: np.ndarray, lr: float, is_exact: bool) -> None:
        steps = [adam.step(g, lr) for adam, g in zip(self.adams, (grad @ self.A.T, self.B.T @ grad), strict=True)]
        if is_exact:
            self.B, self.A = exact(self.B, self.A, *steps)
            for adam in self.adams:
                adam.reset()
        else:
            self.B, self.A = self.B - 3 / 6 * steps[0], self.A - 3 / 6 * steps[1]


def test_twenty_updates_are_those_of_the_paper() -> None:
    """Five exact steps among them; equal to 1e-9, all in float64."""
    method = make()
    network = network_with(method)
    layers = [Rewritten(layer) for layer in (network.one, network.two)]
    expected = []

    def follow(step: int) -> None:
        x, target = (part.numpy() for part in batches()[step - 1])
        loss, *grads = loss_and_gradients(*(layer.B @ layer.A for layer in layers), x, target)
        expected.append(loss)
        climbing = {0: 1e-6, 1: 0.5 * (1 + 1e-6)}.get((step - 1) % 4, 1.0) if step > 4 else 1.0
        for layer, rewritten, grad in zip((network.one, network.two), layers, grads, strict=True):
            rewritten.update(grad, LR * climbing, step % 4 == 0)
            np.testing.assert_allclose(layer.dense_weight(), rewritten.B @ rewritten.A, atol=1e-9)

    losses = train(method, network, see=follow)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("sides", [(40, 24), (24, 40)])
def test_the_step_is_the_projected_gradient_to_first_order(sides: tuple[int, int]) -> None:
    """With the true gradients of one dense G, and for small steps: W - t P(G), with an error of t^2."""
    draw = torch.Generator().manual_seed(0)
    B, A, G = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((sides[0], 5), (5, sides[1]), sides)
    )
    columns, rows = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    projected = columns @ G + G @ rows - columns @ G @ rows
    errors = []
    for t in (1e-3, 1e-4):
        new_B, new_A = riemannian_step(B, A, t * G @ A.t(), t * B.t() @ G)
        errors.append((new_B @ new_A - (B @ A - t * projected)).norm().item())
        torch.testing.assert_close(new_B.t() @ new_B, new_A @ new_A.t())
    assert errors[1] < 0.015 * errors[0] < 1e-3


def test_a_step_of_zero_leaves_the_function() -> None:
    B, A = torch.randn(24, 5), torch.randn(5, 40)
    new_B, new_A = riemannian_step(B, A, torch.zeros_like(B), torch.zeros_like(A))
    assert (new_B.float() @ new_A.float() - B @ A).norm() <= 1e-6 * (B @ A).norm()


def test_without_exact_steps_it_is_low_rank_bit_for_bit() -> None:
    ends = []
    for method in (
        make(exact_every=0, lr_width=0),
        make(exact_every=STEPS + 1, lr_width=0),
        LowRank(name="low_rank", rank=3, alpha=3.0, start="xavier"),
    ):
        network = network_with(method)
        train(method, network)
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], end[name]) for name in ends[0] for end in ends[1:])


def test_factors_without_full_rank_take_the_plain_step() -> None:
    method = make(exact_every=1, restart_warmup=0, lr_width=0)
    network = network_with(method)
    plain = network_with(make(exact_every=0, lr_width=0))
    for each in (network, plain):
        with torch.no_grad():
            each.one.B[:, 0] = 0
    train(method, network, steps=1)
    train(make(exact_every=0, lr_width=0), plain, steps=1)
    torch.testing.assert_close(network.one.B, plain.one.B)
    assert not torch.allclose(network.two.B, plain.two.B)


@pytest.mark.parametrize(("refresh", "gone"), [("all", 2), ("factors", 1), ("none", 0)])
def test_refresh_chooses_whose_moments_begin_again(refresh: str, gone: int) -> None:
    """`two` is left dense, so that its moments are not those of a factor."""
    method = make(refresh=refresh)
    network = network_with(method)
    network.two = torch.nn.Linear(9, 7, bias=False, dtype=torch.float64)
    reset: list[str] = []
    schedule = Schedule(method.actions(Running(network, 8, lambda names: reset.extend(names))))
    schedule.before_step(4)
    schedule.run(4)
    expected = [["one.A", "one.B", "two.weight"], ["one.A", "one.B"], []][2 - gone]
    assert sorted(reset) == expected


@pytest.mark.parametrize("sizes", [(384, 384, 96), (256, 768, 64), (768, 256, 64), (512, 512, 200), (352, 128, 16)])
def test_memory_of_an_exact_step_is_planned(sizes: tuple[int, int, int]) -> None:
    out, in_, rank = sizes
    B, A = torch.randn(out, rank), torch.randn(rank, in_)
    _, measured = tensor_peak(lambda: riemannian_step(B, A, 0.01 * B, 0.02 * A), 0, torch.device("cpu"))
    assert measured == pytest.approx(step_bytes(*sizes, 4), rel=0.05)


def test_parameters_by_formula() -> None:
    network = network_with(make())
    assert [layer.num_trained for layer in (network.one, network.two)] == [3 * (12 + 9), 3 * (9 + 7)]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["rank=0"], "method=loro needs rank above 0, and rank is 0"),
        (["method.refresh=some"], "method.refresh=some: choose one of all, factors, none"),
        (["method.start=uniform"], "method.start=uniform: choose one of xavier, spectral"),
        (["method.exact_every=3"], "method.restart_warmup=5: must be at most method.exact_every=3"),
        (["per_layer_update=true", "grad_clip=null"], "method=loro acts between .* set per_layer_update=false"),
        (["ema=0.9"], "ema=0.9 averages each tensor by itself, and method=loro exchanges"),
    ],
)
def test_refused_in_one_line(typed: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compose_config(["model=llama_tiny", "method=loro", *typed], TRAIN)
