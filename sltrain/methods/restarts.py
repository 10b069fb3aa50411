"""Restarts for methods with a product B A: SLTrain-restarts (Glentis et al., arXiv 2505.22922).

After every n-th update, with the singular value decomposition B A = U diag(s) V^T:

    balance    B <- U diag(sqrt(s)),  A <- diag(sqrt(s)) V^T      W stays; S and alpha / r are not touched
    reset      moments and numbers of updates of all trained parameters begin again
    warmup     the learning rate climbs from 0.001 of the schedule's value to all of it, linearly over w updates

Over time one factor grows and the other does not, and Adam, which moves both by the same amount, then moves the product
too much in one and too little in the other; balanced factors share the singular values evenly. In the paper both parts
help low-rank and SLTrain models, the reset more.

A restart depends on the number of its update alone, not on the length of the run, so that `extend=` stays exact: one
inside the schedule's own warmup multiplies the two, and one less than w updates before the end leaves the rate low.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sltrain.methods.base import Method, check_at_least

if TYPE_CHECKING:
    from sltrain.engine.actions import Action, Moment, Running

LOWEST = 0.001  # of the schedule's learning rate, in the first update after a restart


@dataclass
class Restarts(Method):
    """The options that methods with restarts share."""

    restart_every: int = 0  # updates from restart to restart; 0: none
    restart_balance: bool = True  # whether B and A are balanced
    restart_reset: bool = True  # whether the optimizer begins again
    restart_warmup: int = 10  # updates until the learning rate is that of the schedule; 0: at once

    def check(self) -> None:
        super().check()
        check_at_least(0, restart_every=self.restart_every, restart_warmup=self.restart_warmup)
        own = {"restart_balance": True, "restart_reset": True, "restart_warmup": 10}
        typed = [f"method.{key}={getattr(self, key)}".lower() for key in own if getattr(self, key) != own[key]]
        if self.restart_every == 0 and typed:
            raise ValueError(f"{typed[0]} has no effect without restarts; set method.restart_every above 0, or drop it")
        if 0 < self.restart_every <= self.restart_warmup:
            raise ValueError(
                f"method.restart_warmup={self.restart_warmup} is not over before the next restart, after"
                f" method.restart_every={self.restart_every} updates; lower it, or restart less often"
            )
        if self.restart_every and not (self.restart_balance or self.restart_reset or self.restart_warmup > 1):
            raise ValueError(
                f"method.restart_every={self.restart_every} restarts nothing: set one of restart_balance,"
                " restart_reset, restart_warmup"
            )

    def exchanges_factors(self) -> bool:
        return self.restart_every > 0 and self.restart_balance

    def lr_factor(self, step: int, max_steps: int) -> float:
        return jagged(step, self.restart_every, self.restart_warmup, LOWEST)

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action, every
        from sltrain.layers.factors import FactoredLinear

        layers = [layer for layer in running.model.modules() if isinstance(layer, FactoredLinear)]

        def restart(moment: "Moment") -> None:
            if self.restart_balance:
                for layer in layers:
                    layer.balance()
            if self.restart_reset:
                running.reset_state(name for name, p in running.model.named_parameters() if p.requires_grad)

        others = super().actions(running)
        if self.restart_every == 0:
            return others
        temporary = max((layer.balance_bytes for layer in layers), default=0) if self.restart_balance else 0
        return [
            *others,
            Action("restart", every(self.restart_every), restart, temporary, decomposes=self.restart_balance),
        ]


def check_climb(restart_warmup: int, **interval: int) -> None:
    """Raise ValueError for a climb after a restart that is not over before the next one."""
    for name, every in interval.items():
        if 0 < every < restart_warmup:
            raise ValueError(f"method.restart_warmup={restart_warmup}: must be at most method.{name}={every}")


def climb(number: int, warmup: int, lowest: float) -> float:
    """A factor of the learning rate, `number` updates after a restart: from `lowest` linearly to 1 in `warmup`
    updates, the first of which has number 0."""
    return 1.0 if number >= warmup - 1 else lowest + (1.0 - lowest) * number / (warmup - 1)


def jagged(step: int, interval: int, warmup: int, lowest: float) -> float:
    """The factor of update `step`, from 1, when a restart with such a climb follows every `interval` updates; 0: none
    does."""
    return climb((step - 1) % interval, warmup, lowest) if 0 < interval < step else 1.0
