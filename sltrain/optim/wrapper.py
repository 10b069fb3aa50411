"""An optimizer that works through another one.

Per-layer update and stochastic rounding change when and how an update is made, not what is remembered between updates.
So they wrap an ordinary optimizer and have no state of their own: a checkpoint holds that of the innermost ones, by
parameter name (named_state.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


class WrappedOptimizer(Optimizer):
    """The groups and the state of `inner`, as an optimizer. A subclass defines `step`."""

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for _, parameter in with_gradients(self):
            parameter.grad = None

    def close(self) -> None:
        """Release the parameters, so that another optimizer can have them."""
        for member in self.members:
            if isinstance(member, WrappedOptimizer):
                member.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: hooks, numbers and pieces are made for the parameters given at the start."""
        raise TypeError(f"{type(self).__name__} has all its parameters from the start; see rebuild_optimizer")

    def state_dict(self) -> dict[str, Any]:
        """Refused: torch's state_dict, by index, does not distinguish pieces and members."""
        raise TypeError(f"the state of {type(self).__name__} is saved by parameter name, see optim/named_state.py")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused, as `state_dict`."""
        self.state_dict()


def innermost(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that have the state: those that `optimizer` works through, or itself."""
    if not isinstance(optimizer, WrappedOptimizer):
        return [optimizer]
    return [leaf for member in optimizer.members for leaf in innermost(member)]


def with_gradients(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    """(group, parameter) for every parameter that has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter


@contextmanager
def only(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Iterator[None]:
    """Inside this context the optimizer has one parameter, with the settings of `group`; its state stays whole.

    The cost does not grow with the number of parameters. torch's and bitsandbytes' optimizers read `param_groups` in
    every step, and keep their state by parameter.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups
