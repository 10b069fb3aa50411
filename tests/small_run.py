"""A small network trained as a run trains a model: the method's layers, phases, actions and learning rate, with the
optimizer of a run. Parity tests compare it with a rewrite of a method's mathematics."""

from typing import Any

import torch
from optimizers import make_optimizer
from torch import Tensor, nn

from sltrain.building.phases import Live
from sltrain.engine.actions import Phase, Running, Schedule, begun
from sltrain.methods.base import METHODS, Method
from sltrain.optim.build import set_learning_rate
from sltrain.optim.named_state import rebuild_optimizer
from sltrain.optim.per_layer import PerLayerUpdate

SIDES = [(12, 20), (20, 9)]  # (in, out) of the two layers


def method_of(name: str, **options: Any) -> Method:
    """The checked method with these options."""
    method = METHODS.load(name)(name=name, **options)
    method.check()
    return method


class Net(nn.Module):
    """Two linears of SIDES with tanh between. With a target, the mean of squares."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sides, bias=False, dtype=dtype) for sides in SIDES)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.layers[1](torch.tanh(self.layers[0](x)))
        return y if target is None else (y - target).square().mean()


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows and targets of update `step`."""
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randn(32, width, generator=generator, dtype=torch.float64).to(dtype) for width in (12, 9)]
    return rows[0], rows[1]


class SmallRun:
    """`update` makes one update and what the method does after it."""

    def __init__(
        self,
        method: Method,
        max_steps: int,
        lr: float = 0.01,
        optimizer: str = "adamw",
        per_layer: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        torch.manual_seed(0)
        self.method, self.max_steps, self.lr, self.step = method, max_steps, lr, 0
        self.optimizer_name, self.per_layer = optimizer, per_layer
        self.model = Net(dtype)
        method.replace(self.model, lambda name, linear: True)
        phases = method.phases(max_steps)
        for phase in begun(phases, 0):
            self._change(phase, torch.Generator().manual_seed(0))
        self.live = Live(self._build())
        self.schedule = Schedule(self._actions(), phases, seed=7, enter=self._enter)

    def update(self) -> None:
        """One update by the mean of squares, then what is due."""
        self.step += 1
        set_learning_rate(self.live.optimizer, self.lr * self.method.lr_factor(self.step, self.max_steps))
        optimizer = self.live.optimizer
        optimizer.zero_grad()
        if isinstance(optimizer, PerLayerUpdate):
            optimizer.before_backward(is_last=True)
        inputs = batch(self.step, self.dtype)
        self.model(*inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        self.schedule.run(self.step, lambda: [inputs])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def weights(self) -> list[Tensor]:
        """The dense W of both layers."""
        return [layer.dense_weight().clone() for layer in self.model.layers]  # type: ignore[operator]

    def _build(self) -> Any:
        inner = make_optimizer(
            self.model.named_parameters(),
            name=self.optimizer_name,
            lr=self.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            device=torch.device("cpu"),
        )
        return PerLayerUpdate(inner) if self.per_layer else inner

    def _actions(self) -> Any:
        return self.method.actions(Running(self.model, self.max_steps, self.live.reset, self.live.change))

    def _change(self, phase: Phase, generator: torch.Generator) -> None:
        phase.change(self.model)
        phase.start(self.model, generator)

    def _enter(self, phase: Phase, generator: torch.Generator) -> None:
        self._change(phase, generator)
        self.live.optimizer = rebuild_optimizer(self.live.optimizer, self._build)
        self.schedule.actions = self._actions()


class Adam:
    """Adam without decay, as its paper writes it, for tensors by name."""

    def __init__(self) -> None:
        self.state: dict[str, tuple[int, Tensor, Tensor]] = {}

    def step(self, named: dict[str, Tensor], lr: float) -> None:
        """Update leaves by their gradients, and drop these."""
        for name, tensor in named.items():
            assert tensor.grad is not None
            count, m, v = self.state.get(name, (0, torch.zeros_like(tensor), torch.zeros_like(tensor)))
            count += 1
            m, v = 0.9 * m + 0.1 * tensor.grad, 0.999 * v + 0.001 * tensor.grad**2
            self.state[name] = count, m, v
            with torch.no_grad():
                tensor -= lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
            tensor.grad = None


def leaf(tensor: Tensor) -> Tensor:
    """A copy that gradients are computed of."""
    return tensor.detach().clone().requires_grad_()
