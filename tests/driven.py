"""A method around a small network, trained by its own optimizer and actions as a run does it, with nothing else of a
run; and what rewrites of a method's mathematics in NumPy share."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sltrain.building.phases import Live
from sltrain.engine.actions import Running, Schedule
from sltrain.methods.base import Method
from sltrain.optim.build import build_optimizer, set_learning_rate
from sltrain.optim.kinds.adamw import AdamWOptions
from sltrain.planning.roles import parameters_of

SIZES = 12, 9, 7  # inputs, hidden units, outputs
LR, STEPS = 0.02, 20
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


class Network(nn.Module):
    """y = W2 relu(W1 x), and half its squared distance from a target, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Linear(SIZES[0], SIZES[1], bias=False, dtype=torch.float64)
        self.two = nn.Linear(SIZES[1], SIZES[2], bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = (self.two(self.one(x).relu()) - target).square().sum() / 2
        return loss


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Another x and target for each update."""
    draw = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(16, size, generator=draw, dtype=torch.float64) for size in (SIZES[0], SIZES[2]))  # type: ignore[misc]
        for _ in range(steps)
    ]


def network_with(method: Method, seed: int = 0) -> Network:
    """The network after `replace`."""
    network = Network(seed)
    method.check()
    assert method.replace(network, lambda name, linear: True) == ["one", "two"]
    return network


def train(
    method: Method,
    network: nn.Module,
    steps: int = STEPS,
    see: Callable[[int], None] = lambda step: None,
    lr: float = LR,
) -> list[float]:
    """The losses of so many updates; `see` is called with the number of each, after its actions."""
    infos = parameters_of(network)
    options = AdamWOptions(name="adamw", betas=[BETA1, BETA2], eps=EPS)
    live = Live(
        build_optimizer(
            network.named_parameters(),
            options,
            lr=lr,
            weight_decay=0.0,
            device=torch.device("cpu"),
            infos=infos,
            group_options=method.group_options,
        )
    )
    schedule = Schedule(method.actions(Running(network, steps, live.reset)), seed=3)
    losses = []
    for step, (x, target) in enumerate(batches(steps), start=1):
        set_learning_rate(live.optimizer, lr * method.lr_factor(step, steps))
        live.optimizer.zero_grad()
        loss = network(x, target)
        loss.backward()
        schedule.before_step(step)
        live.optimizer.step()
        live.optimizer.zero_grad()
        schedule.run(step)
        losses.append(loss.item())
        see(step)
    return losses


Array = np.ndarray


class Adam:
    """Kingma and Ba, algorithm 1: the step that Adam takes with one array; `reset` begins again."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.mean, self.square, self.count = 0.0, 0.0, 0

    def step(self, gradient: Array, lr: float) -> Array:
        """What to subtract from the array."""
        self.count += 1
        self.mean = BETA1 * self.mean + (1 - BETA1) * gradient
        self.square = BETA2 * self.square + (1 - BETA2) * gradient**2
        mean = self.mean / (1 - BETA1**self.count)
        return lr * mean / (np.sqrt(self.square / (1 - BETA2**self.count)) + EPS)


def loss_and_gradients(one: Array, two: Array, x: Array, target: Array) -> tuple[float, Array, Array]:
    """The loss of Network with these dense matrices (out, in), and its gradients by both."""
    hidden = np.maximum(x @ one.T, 0)
    error = hidden @ two.T - target
    at_hidden = (error @ two) * (hidden > 0)
    return float((error**2).sum() / 2), at_hidden.T @ x, error.T @ hidden
