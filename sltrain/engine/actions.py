"""What a method does between updates. An action changes values (merges factors, resets moments, redraws masks); a phase
changes the structure (parameters join or are frozen).

    gradients of update k -> `before` of actions due after update k -> optimizer's step k
                          -> phases, then actions, due after update k -> evaluation, then checkpoint, of step k

The checkpoint of step k thus contains what its actions did, and a resumed run repeats none of them. Random numbers come
from a generator seeded by (seed, name of the action, step): all ranks draw the same, and no generator state is saved.

A phase builds a new optimizer for the changed model, by the code that built the first one, and gives it the old state
by parameter name; new parameters start without. On resume, every phase that has begun applies `change` to the model on
the meta device; only then is memory allocated and the checkpoint read.

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
from torch import Tensor, nn

ReadInputs = Callable[[], Sequence[tuple[Tensor | None, ...]]]


class Stateful(Protocol):
    """An object whose state is saved in checkpoints: the optimizer, or what an action keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data by name; the tensors may be the object's own."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. Its tensors are on the CPU; unless the model is there too they are views of a file, so a
        tensor that stays on the CPU must be copied. Raises ValueError for the state of another kind of object."""


@dataclass(frozen=True)
class Moment:
    """When an action happens: after update `step`, with random numbers of its own, on the CPU."""

    step: int
    generator: torch.Generator
    inputs: ReadInputs = tuple  # this rank's micro-batches of the update: arguments for which the model returns a loss


@dataclass(frozen=True)
class Action:
    """A change of weights or optimizer state after some updates."""

    name: str  # unique in a run
    is_due: Callable[[int], bool]  # step -> whether it happens after this update; see `every`, `at`
    apply: Callable[[Moment], None]  # under no_grad; must do the same on all ranks
    temporary_bytes: int = 0  # memory it takes while it works, for the plan
    state: Stateful | None = None  # saved in checkpoints under the action's name
    before: Callable[[], None] | None = None  # in an update after which it is due: with gradients, before the optimizer
    before_bytes: int = 0  # memory held from there until `apply` is over, for the plan; also in temporary_bytes
    passes: bool = False  # it calls the model with a micro-batch, forward and backward
    decomposes: bool = False  # its result may differ in the last bit between machines, so rank 0's is sent to all


@dataclass(frozen=True)
class Phase:
    """A part of the run with its own structure. It begins after update `after`, before that step's actions."""

    name: str
    after: int  # updates; 0: before the first
    change: Callable[[nn.Module], None]  # adds or freezes parameters, without values; also on the meta device
    start: Callable[[nn.Module, torch.Generator], None] = lambda model, generator: None  # fills new parameters
    decomposes: bool = False  # as an action's
    # Of the model before it: the memory that it takes beside that and the optimizer's state, for the plan
    temporary_bytes: Callable[[nn.Module], int] = lambda model: 0


@dataclass(frozen=True)
class Running:
    """What a method's actions work on. A plan builds them for a model on the meta device and never applies them."""

    model: nn.Module
    max_steps: int
    reset_state: Callable[[Iterable[str]], None] = lambda names: None  # drops the optimizer state of these parameters
    # Applies change(name, moments), which works in place, to each of them, or drops state of another form.
    change_moments: Callable[[Iterable[str], Callable[[str, list[Tensor]], None]], None] = lambda names, change: None
    sum_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor  # sums a tensor over all ranks, in place


def every(interval: int) -> Callable[[int], bool]:
    """Due after every `interval` updates; never for 0."""
    return lambda step: interval > 0 and step % interval == 0


def at(*steps: int) -> Callable[[int], bool]:
    """Due after each of these updates."""
    return lambda step: step in steps


def begun(phases: Sequence[Phase], step: int) -> list[Phase]:
    """The phases that have begun once update `step` is done, in order."""
    return [phase for phase in sorted(phases, key=lambda phase: phase.after) if phase.after <= step]


def generator_for(seed: int, name: str, step: int) -> torch.Generator:
    """The random numbers of one action at one step, on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


@dataclass
class Schedule:
    """The actions and phases of a run. `enter(phase, generator)` changes the model and rebuilds the optimizer;
    `agree()` gives every rank the model of rank 0."""

    actions: Sequence[Action] = ()
    phases: Sequence[Phase] = ()
    seed: int = 0
    enter: Callable[[Phase, torch.Generator], None] = lambda phase, generator: None
    agree: Callable[[], None] = lambda: None
    is_acting: bool = False  # while some weights are changed and others not yet, also after an error in that

    def __post_init__(self) -> None:
        names = [action.name for action in self.actions] + [phase.name for phase in self.phases]
        assert len(names) == len(set(names)), f"actions and phases of one name: {names}"

    def is_due(self, step: int) -> bool:
        """Whether anything happens after update `step`."""
        return any(phase.after == step for phase in self.phases) or any(a.is_due(step) for a in self.actions)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Call `before` of the actions that are due after update `step`. An update that is skipped does not come here,
        and with updates inside backward there is no such moment (Method.acts_before_step)."""
        for action in self.actions:
            if action.before is not None and action.is_due(step):
                self.is_acting = True
                action.before()

    @torch.no_grad()
    def run(self, step: int, inputs: ReadInputs = tuple) -> None:
        """Begin the phases, then apply the actions, that are due after update `step`, made of `inputs`."""
        self.is_acting = True
        for phase in self.phases:
            if phase.after == step:
                self.enter(phase, generator_for(self.seed, phase.name, step))
        for action in self.actions:
            if action.is_due(step):
                action.apply(Moment(step, generator_for(self.seed, action.name, step), inputs))
                if action.decomposes:
                    self.agree()
        self.is_acting = False

    def stateful(self) -> dict[str, Stateful]:
        """The states of actions that checkpoints save, by name."""
        return {f"action/{action.name}": action.state for action in self.actions if action.state is not None}
