"""The optimizer of a model in shards: element-wise rules on each process's rows, others on whole tensors at owners."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from sltrain.config import TrainConfig
from sltrain.engine.sharded import Sharded
from sltrain.optim.build import member_for
from sltrain.optim.named_state import named_state
from sltrain.optim.per_unit import PerUnitUpdate
from sltrain.optim.rounding import draw_as
from sltrain.optim.whole_tensors import WholeTensors
from sltrain.planning.roles import parameters_of

Build = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]


def build_on_shards(config: TrainConfig, model: nn.Module, strategy: Sharded, build: Build) -> Optimizer:
    """What `build` makes of this process's rows of parameters, and of the whole tensors that it owns; with
    per_layer_update, to work inside backward. Raises ValueError if a process would have nothing to update."""
    optimizer = _build(config, model, strategy, build)
    if not config.per_layer_update:
        return optimizer
    clip = config.grad_clip_per_parameter
    return PerUnitUpdate(optimizer, strategy.units, strategy.take, strategy.whole_norms, clip)


def _build(config: TrainConfig, model: nn.Module, strategy: Sharded, build: Build) -> Optimizer:
    infos, rounds = parameters_of(model), config.stochastic_rounding
    whole = [name for name, info in infos.items() if not member_for(config.optimizer, info).works_on_shards(rounds)]
    if not whole and not rounds:
        return build(strategy.named_parameters(model))
    of_one, owners = build(strategy.stand_ins()), None  # what one process would have
    mine = strategy.named_parameters(model)
    if whole:
        owners = strategy.give_owners(whole)
        state = named_state(of_one)
        owners.labels = {key: state[key] for key in ("class", "groups")}
        mine = owners.updated_here()
    strategy.ranks.everywhere(lambda: _check_has_some(config, mine))
    optimizer = build(mine)
    if rounds:
        draw_as(optimizer, of_one, {name: at for name, at in strategy.places().items() if name not in whole})
    return optimizer if owners is None else WholeTensors(optimizer, owners.turns)


def _check_has_some(config: TrainConfig, mine: list[tuple[str, nn.Parameter]]) -> None:
    if not mine:
        raise ValueError(
            f"optimizer={config.optimizer.name} updates whole modules, each on one process, and there are more"
            " processes than modules; start fewer, or set optimizer=adamw"
        )
