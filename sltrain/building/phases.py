"""The phases and actions of a run (engine/actions.py), wired to its model, optimizer and trainer."""

import logging
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sltrain.config import TrainConfig, num_steps
from sltrain.engine import ema
from sltrain.engine.actions import Action, Phase, Running, begun, every
from sltrain.engine.ema import Average
from sltrain.optim.build import check_takes, member_for, takes_some
from sltrain.optim.named_state import change_moments, reset_state
from sltrain.parameters import PIECE
from sltrain.planning.roles import parameters_of

Named = Iterable[tuple[str, nn.Parameter]]

logger = logging.getLogger(__name__)


def phases_of(config: TrainConfig) -> list[Phase]:
    """The phases of a run of this configuration, in order."""
    phases = config.method.phases(num_steps(config))
    return sorted(phases, key=lambda phase: phase.after)


def change_until(config: TrainConfig, model: nn.Module, step: int) -> None:
    """Give a model on the meta device, as `build_model` made it, the structure that it has once update `step` is
    done."""
    for phase in begun(phases_of(config), step):
        if phase.after > 0:
            phase.change(model)


def structures(config: TrainConfig, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Each structure that the model, on the meta device, has in the course of a run, and the phase that it begins
    with; the first has no name unless a phase begins before the first update."""
    phases = phases_of(config)
    name = "".join(phase.name for phase in phases if phase.after == 0)
    for phase in phases:
        if phase.after > 0:
            yield name, model
            model, name = deepcopy(model), phase.name
            phase.change(model)
    yield name, model


def check_structures(config: TrainConfig, model: nn.Module) -> None:
    """Raise ValueError if the optimizer takes nothing of the model as the last phase has it. What it takes may join
    late, as the adapters of method=slope."""
    *_, (_, last) = structures(config, model)
    check_takes(config.optimizer, parameters_of(last).values())


def waiting_notes(config: TrainConfig, model: nn.Module) -> list[str]:
    """A line if the optimizer takes nothing of the model before one of the phases; else nothing."""
    options, note = config.optimizer, []
    coming = [phase for phase in phases_of(config) if phase.after > 0]
    for phase, (_, before) in zip(coming, structures(config, model), strict=False):
        infos = parameters_of(before).values()
        if takes_some(options, infos):
            break
        others = " and ".join(sorted({member_for(options, info).name for info in infos}))
        note = [
            f"optimizer={options.name} takes no parameter of method={config.method.name} before its phase"
            f" {phase.name}, after update {phase.after:,}: until then {others} trains all of them"
        ]
    return note


def actions_of(config: TrainConfig, model: nn.Module) -> list[Action]:
    """The actions for a model without values, to plan with."""
    return [*config.method.actions(Running(model, num_steps(config))), *_averaging(config, model)]


def _averaging(config: TrainConfig, model: nn.Module, named: Named | None = None) -> list[Action]:
    """The action of `ema`, after those of the method, for the parameters as this process holds them."""
    if config.ema is None:
        return []
    average = Average(model, config.ema, named)
    narrow = [p.numel() for p in model.parameters() if p.requires_grad and p.element_size() < 4]
    temporary = 4 * min(max(narrow, default=0), PIECE)
    return [Action(ema.NAME, every(1), lambda moment: average.update(), temporary, average)]


@dataclass
class Live:
    """The optimizer of a running model, which is another one after each phase."""

    optimizer: torch.optim.Optimizer
    sum_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor
    has_told: bool = False  # that state was dropped

    def reset(self, names: Iterable[str]) -> None:
        """Make the state of these parameters as new."""
        reset_state(self.optimizer, list(names))

    def change(self, names: Iterable[str], change: Callable[[str, list[Tensor]], None]) -> None:
        """Change their moments in place, or drop them, with a line the first time, where they are in another form."""
        if change_moments(self.optimizer, list(names), change) and not self.has_told:
            logger.info("note       state of another form than moments of a weight's shape begins again instead")
            self.has_told = True


def live_actions(config: TrainConfig, model: nn.Module, live: Live, named: Named | None = None) -> list[Action]:
    """The actions for the model of a run. `named`: its parameters as this process holds them; None: whole."""
    running = Running(model, num_steps(config), live.reset, live.change, live.sum_ranks)
    return [*config.method.actions(running), *_averaging(config, model, named)]
