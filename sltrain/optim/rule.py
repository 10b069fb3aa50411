"""The torch optimizer of a rule, which says for one tensor what to subtract; kinds/rule.py is the base of rules.

step, state    kept for the tensor; `new_state` makes the state before its first update
direction      by the rule, from gradient and state, in float32
weight         weight - lr (weight_decay weight + direction)
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.optim.wrapper import with_gradients

Factor = tuple[Tensor, Tensor, dict[str, Any]]  # weight, gradient, state


class TensorRule(Protocol):
    """A rule for one tensor; kinds/rule.py says what the functions do."""

    def new_state(self, weight: Tensor) -> dict[str, Any]: ...
    def direction(self, grad: Tensor, state: dict[str, Any]) -> Tensor: ...


class FactorsRule(TensorRule, Protocol):
    """A rule for the factors A and B of a layer together."""

    def directions(self, A: Factor, B: Factor) -> tuple[Tensor, Tensor]: ...


class ByRule(Optimizer):
    """Updates each parameter that has a gradient by `rule`; groups as for any torch optimizer, with "weight_decay"."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, rule: TensorRule) -> None:
        super().__init__(groups, {"lr": lr})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "evaluate the loss before the step"
        for group, parameter in with_gradients(self):
            assert parameter.grad is not None
            self._move(parameter, group, self.rule.direction(parameter.grad.float(), self._counted(parameter)))

    def _counted(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, for one more update."""
        state = self.state[parameter]
        if not state:
            state.update(step=0, **self.rule.new_state(parameter))
        state["step"] += 1
        return state

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], direction: Tensor) -> None:
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"])


class ByPair(ByRule):
    """The same for a rule that needs the factors A and B of a layer together: both directions are known before either
    factor moves. Parameters are paired by name, X.A with X.B."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, rule: FactorsRule) -> None:
        super().__init__(groups, lr, rule)
        self.pair_rule = rule
        named = {
            name: (parameter, group)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        firsts = sorted(name for name in named if name.endswith(".A"))
        self._pairs = [(named[name], named[f"{name[:-1]}B"]) for name in firsts]
        assert 2 * len(self._pairs) == len(named), "a factor without its partner"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "evaluate the loss before the step"
        for pair in self._pairs:
            if any(parameter.grad is None for parameter, _ in pair):
                continue
            factors = [(p.detach().float(), p.grad.float(), self._counted(p)) for p, _ in pair]
            for (parameter, group), direction in zip(pair, self.pair_rule.directions(*factors), strict=True):
                self._move(parameter, group, direction)


def named_after(rule: TensorRule, base: type[ByRule]) -> type[ByRule]:
    """A class of the rule's name, by which checkpoints know the optimizer."""
    return type(type(rule).__name__, (base,), {})
