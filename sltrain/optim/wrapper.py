"""An optimizer that works through another one.

Per-layer update and stochastic rounding change when and how an update is made, not what is remembered between updates.
So they stand around an ordinary optimizer and have no state of their own: a checkpoint holds the innermost one's. So
per-layer update can be put on and taken off between two runs; the others change what is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


class WrappedOptimizer(Optimizer):
    """The face of `inner`: its groups, its state, its state_dict. A subclass says what `step` does."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner  # Optimizer.__init__ would make groups and a state of its own
        self.members = [inner]  # what it works through; Composite has several

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def close(self) -> None:
        """Let go of the parameters, which another optimizer may then have."""
        if isinstance(self.inner, WrappedOptimizer):
            self.inner.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: hooks, numbers and pieces are made for the parameters given at the start."""
        raise TypeError(f"{type(self).__name__} has all its parameters from the start; see rebuild_optimizer")


def innermost(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that have the state: those that `optimizer` works through, or itself."""
    if not isinstance(optimizer, WrappedOptimizer):
        return [optimizer]
    return [leaf for member in optimizer.members for leaf in innermost(member)]


def with_gradients(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    """(its group, parameter) for every parameter that has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter


@contextmanager
def only(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Iterator[None]:
    """Inside this context the optimizer has one parameter, with the settings of `group`; its state stays whole.

    The cost does not depend on how many parameters there are. torch's optimizers and bitsandbytes' read `param_groups`
    anew in every step, and keep their state by parameter.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups
