"""What a method does between updates: merge factors, restart moments, change masks; and phases, after which the model
has other parameters.

    update k -> phases and actions that are due after update k -> evaluation, then checkpoint, of step k

So the checkpoint of step k holds what its actions left, and a run resumed from it does none of them twice. Random
numbers come from a generator seeded by (seed, name of the action, step): every rank draws the same, and a resumed run
needs no state of a generator.

An action changes values, or resets optimizer state. A phase changes the structure: parameters join, or are frozen. When
it begins, the optimizer is built again for the model as it now is, by the code that built it at the start, and gets
its state back by name; new parameters start without. On resume the counters are read first, `change` is applied for
every phase that has begun, still on the meta device, and then memory is allocated and the checkpoint read.

    def actions(self, running):
        def merge(moment):
            for layer in layers_of(running.model):
                layer.merge()
            running.reset_state(factor_names(running.model))
        return [Action("merge", every(self.merge_every), merge)]
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class Stateful(Protocol):
    """An object whose state survives a restart: the optimizer, what an action keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data by name; the tensors may be the object's own."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. Its tensors are on the CPU; where the model is elsewhere they are views of a file, so
        those that stay on the CPU have to be copied. Raises ValueError for the state of another kind of object."""


@dataclass(frozen=True)
class Moment:
    """When an action happens: after update `step`, with random numbers of its own, on the CPU."""

    step: int
    generator: torch.Generator


@dataclass(frozen=True)
class Action:
    """Something done to weights or optimizer state after some updates."""

    name: str  # unique among the actions of a run
    is_due: Callable[[int], bool]  # step -> whether it is done after this update; see `every`, `at`
    apply: Callable[[Moment], None]  # under no_grad; equal on all ranks
    temporary_bytes: int = 0  # memory that it takes while it works, for the plan
    state: Stateful | None = None  # kept in checkpoints under the action's name


@dataclass(frozen=True)
class Phase:
    """A part of the run with a structure of its own. It begins after update `after`, before that step's actions."""

    name: str
    after: int  # updates; 0: before the first
    change: Callable[[nn.Module], None]  # makes or freezes parameters, without values; also on the meta device
    start: Callable[[nn.Module, torch.Generator], None] = lambda model, generator: None  # gives new parameters values


@dataclass(frozen=True)
class Running:
    """What the actions of a method may work on. A plan asks for them with a model on the meta device, and applies
    none."""

    model: nn.Module
    max_steps: int
    reset_state: Callable[[Iterable[str]], None] = lambda names: None  # optimizer state of these parameters -> as new


def every(interval: int) -> Callable[[int], bool]:
    """After every `interval` updates; never for 0."""
    return lambda step: interval > 0 and step % interval == 0


def at(*steps: int) -> Callable[[int], bool]:
    """After each of these updates."""
    return lambda step: step in steps


def begun(phases: Sequence[Phase], step: int) -> list[Phase]:
    """The phases that have begun once update `step` is done, in order."""
    return [phase for phase in sorted(phases, key=lambda phase: phase.after) if phase.after <= step]


def generator_for(seed: int, name: str, step: int) -> torch.Generator:
    """The random numbers of one action at one step, on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


class Schedule:
    """The actions of a run, done when they are due.

    `enter(phase, generator)` makes a phase's structure the run's: it changes the model and builds the optimizer again.
    """

    def __init__(
        self,
        actions: Sequence[Action] = (),
        phases: Sequence[Phase] = (),
        seed: int = 0,
        enter: Callable[[Phase, torch.Generator], None] = lambda phase, generator: None,
    ) -> None:
        names = [action.name for action in actions] + [phase.name for phase in phases]
        assert len(names) == len(set(names)), f"actions and phases of one name: {names}"
        self.actions, self.phases, self.seed, self.enter = list(actions), list(phases), seed, enter

    def is_due(self, step: int) -> bool:
        """Whether anything happens after update `step`."""
        return any(phase.after == step for phase in self.phases) or any(a.is_due(step) for a in self.actions)

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Begin the phases and do the actions that are due after update `step`."""
        for phase in self.phases:
            if phase.after == step:
                self.enter(phase, generator_for(self.seed, phase.name, step))
        for action in self.actions:
            if action.is_due(step):
                action.apply(Moment(step, generator_for(self.seed, action.name, step)))

    def stateful(self) -> dict[str, Stateful]:
        """What of the actions is kept in checkpoints, by name."""
        return {f"action/{action.name}": action.state for action in self.actions if action.state is not None}
