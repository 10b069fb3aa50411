"""Named parameters and an optimizer's options -> an ordinary torch optimizer.

    which parameters   those that are trained, each once; in groups that share weight decay and learning-rate scale
    which optimizer    the chosen one for what it takes, its `rest()` for the others, and so on (composite.py)
    rounding           an optimizer that does not round stochastically itself is wrapped (rounding.py); so is one of
                       parameters whose values are held as codes
    pieces             an element-wise optimizer so wrapped, which works on copies, gets a parameter in pieces
                       (in_pieces.py)

kinds/base.py defines what an optimizer declares. The bytes of state and step, rounding and pieces included, are counted
here for the memory plan.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sltrain.affine import CodedTensor
from sltrain.numeric import is_stand_in
from sltrain.optim.composite import Composite
from sltrain.optim.in_pieces import InPieces, piece_sizes
from sltrain.optim.kinds.base import OptimizerConfig
from sltrain.optim.rounding import StochasticRounding
from sltrain.parameters import PIECE, ParamInfo, role_by_name

ENCODING = 9  # bytes that rounding to codes takes for each entry of a piece
Groups = list[dict[str, Any]]
GroupOptions = Callable[[ParamInfo], Mapping[str, float]]  # {"lr_scale": 0.5, "weight_decay": 0.0}, or part of it


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    options: OptimizerConfig,
    *,
    lr: float,
    weight_decay: float,
    device: torch.device,
    stochastic_rounding: bool = False,
    seed: int = 0,
    infos: Mapping[str, ParamInfo] | None = None,
    group_options: GroupOptions = lambda parameter: {},
    in_codes: Mapping[nn.Parameter, CodedTensor] | None = None,
) -> Optimizer:
    """The optimizer over `model.named_parameters()`, which live on `device`. Frozen parameters are skipped; a parameter
    that comes twice (tied weights) is updated once.

    Args:
        seed: of stochastic rounding.
        infos: what each parameter is for, by name; without it only gains and biases are recognized, by name.
        group_options: settings of single parameters: "lr_scale" multiplies the learning rate, "weight_decay" replaces
            the run's.
        in_codes: what holds the values of parameters that stand for codes; it is updated in their place, and rounded
            stochastically.

    Raises ValueError for a missing package, and when nothing is trainable. An optimizer may take none of the
    parameters, in a phase that has none for it (`check_takes` is for the whole run).
    """
    trainable = trained_parameters(named_parameters, infos or {})
    held = in_codes or {}
    members: list[Optimizer] = []
    left, member = trainable, options
    while left:
        taken = {p: info for p, info in left.items() if member.takes(info)}
        left = {p: info for p, info in left.items() if p not in taken}
        coded, plain = ({p: info for p, info in taken.items() if (p in held) == which} for which in (True, False))
        for own in filter(None, (coded, plain)):
            groups = parameter_groups(own, weight_decay, group_options)
            if len(own) < len(trainable):
                groups = [{**group, "member": len(members)} for group in groups]
            member.check_package()
            own_seed = seed + len(members)
            if own is coded:
                members.append(StochasticRounding(member.make(groups, lr, device), own_seed, held))
            else:
                members.append(_build_one(groups, member, lr, device, stochastic_rounding, own_seed))
        member = member.rest()
    return members[0] if len(members) == 1 else Composite(members)


def _build_one(
    groups: Groups, options: OptimizerConfig, lr: float, device: torch.device, stochastic_rounding: bool, seed: int
) -> Optimizer:
    if stochastic_rounding and options.rounds:
        return options.make_rounding(groups, lr, device, seed)

    def make(groups: Groups) -> Optimizer:
        optimizer = options.make(groups, lr, device)
        return StochasticRounding(optimizer, seed) if stochastic_rounding else optimizer

    return InPieces(groups, make) if works_in_pieces(options, stochastic_rounding) else make(groups)


def trained_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], infos: Mapping[str, ParamInfo]
) -> dict[nn.Parameter, ParamInfo]:
    """The parameters that are not frozen, each once, a tied one under its first name. Raises ValueError if there is
    none."""
    trained: dict[nn.Parameter, ParamInfo] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad and parameter not in trained:
            shape, role = tuple(parameter.shape), role_by_name(name)
            by_name = ParamInfo(name, shape, parameter.element_size(), role, is_stand_in(parameter))
            trained[parameter] = infos.get(name, by_name)
    if not trained:
        raise ValueError("the model has no trainable parameter: nothing to optimize.")
    return trained


def parameter_groups(
    trainable: Mapping[nn.Parameter, ParamInfo],
    weight_decay: float,
    group_options: GroupOptions = lambda parameter: {},
) -> Groups:
    """The parameters, each exactly once, in groups of equal settings, those that decay first. "param_names" has their
    names, as torch's optimizers keep them."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter, info in sorted(trainable.items(), key=lambda item: not item[1].decays):
        settings = {"weight_decay": weight_decay if info.decays else 0.0, **group_options(info)}
        empty = {"params": [], "param_names": [], **settings}
        group = groups.setdefault((info.decays, *sorted(settings.items())), empty)
        group["params"].append(parameter)
        group["param_names"].append(info.name)
    return list(groups.values())


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr`, times the group's "lr_scale" if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def check_updates(
    *,
    dtype: torch.dtype,
    per_layer_update: bool = False,
    grad_clip: float | None = None,
    stochastic_rounding: bool = False,
) -> None:
    """Raise ValueError for ways of updating that exclude each other; `dtype` is that of the weights."""
    if per_layer_update and grad_clip is not None:
        raise ValueError(
            f"grad_clip={grad_clip} needs all gradients at once, which per_layer_update=true frees one by one; "
            f"set grad_clip=null, and to clip each by itself grad_clip_per_parameter={grad_clip} too."
        )
    if stochastic_rounding and dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic_rounding=true is for bfloat16 weights, and they are {str(dtype).removeprefix('torch.')}; "
            "set dtype=bfloat16, or stochastic_rounding=false."
        )


def takes_some(options: OptimizerConfig, infos: Iterable[ParamInfo]) -> bool:
    """Whether the optimizer takes any of the parameters itself."""
    own = [member for member in members(options) if member.name.startswith(options.name)]  # scale has several
    return any(member.takes(info) for info in infos for member in own)


def check_takes(options: OptimizerConfig, infos: Iterable[ParamInfo]) -> None:
    """Raise ValueError for an optimizer that takes none of the parameters."""
    if not takes_some(options, infos):
        rank = getattr(options, "rank", None)
        lower = "" if rank is None else f" set optimizer.rank below {rank} (below that of A and B), or"
        raise ValueError(
            f"optimizer={options.name} takes none of the model's parameters;{lower} choose another optimizer."
        )


def members(options: OptimizerConfig) -> list[OptimizerConfig]:
    """The optimizer and those that may get what it does not take, in order."""
    found = [options]
    while (more := found[-1].rest()).name not in {member.name for member in found}:
        found.append(more)
    return found


def member_for(options: OptimizerConfig, info: ParamInfo) -> OptimizerConfig:
    """The optimizer that updates this parameter."""
    while not options.takes(info):
        options = options.rest()
    return options


def works_in_pieces(options: OptimizerConfig, stochastic_rounding: bool) -> bool:
    """Whether the optimizer gets its parameters in pieces: it is element-wise, and the wrapper that rounds for it would
    make float32 copies of them."""
    return options.locality == "element" and stochastic_rounding and not options.rounds


def state_bytes(options: OptimizerConfig, infos: Iterable[ParamInfo], stochastic_rounding: bool = False) -> int:
    """Bytes of the state that the result of `build_optimizer` keeps for these parameters."""
    members: dict[tuple[str, bool], OptimizerConfig] = {}
    total = 0
    for info in infos:
        member = member_for(options, info)
        members[member.name, info.in_codes] = member
        if info.in_codes or (stochastic_rounding and not member.rounds):  # it sees float32 copies
            info = dataclasses.replace(info, element_size=4)
        cuts = works_in_pieces(member, stochastic_rounding) and not info.in_codes
        sizes = piece_sizes(info.numel) if cuts else None
        parts = [info] if sizes is None else [dataclasses.replace(info, shape=(size,)) for size in sizes]
        total += sum(map(member.state_bytes, parts))
    return total + sum(member.shared_bytes for member in members.values())


def step_bytes(
    options: OptimizerConfig, infos: Iterable[ParamInfo], device_type: str, stochastic_rounding: bool = False
) -> int:
    """Temporary bytes of a step of `build_optimizer`'s result: those of the parameter that needs most."""
    needs = [0]
    for info in infos:
        member = member_for(options, info)
        if info.in_codes:
            needs.append(_bytes_in_codes(member, info, device_type))
            continue
        if works_in_pieces(member, stochastic_rounding):
            info = dataclasses.replace(info, shape=(min(info.numel, PIECE),))
        outside = 2 * 4 * info.numel if stochastic_rounding and not member.rounds else 0  # weight, gradient in float32
        needs.append(member.step_bytes(info, device_type, stochastic_rounding) + outside)
    return max(needs)


def _bytes_in_codes(member: OptimizerConfig, info: ParamInfo, device_type: str) -> int:
    """Temporary bytes of an update of a parameter in codes: the weight in float32, the gradient if it is narrower, and
    beside them what the optimizer takes, or the rounding of a piece."""
    copies = 4 * info.numel * (2 if info.element_size < 4 else 1)
    exact = dataclasses.replace(info, element_size=4)
    return copies + max(member.step_bytes(exact, device_type, rounding=False), ENCODING * min(info.numel, PIECE))
