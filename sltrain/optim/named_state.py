"""An optimizer's state by the names of its parameters, as a checkpoint stores it and as it outlives a changed model.

    {"class":  name of the optimizer's class; of several, joined by " + ",
     "groups": [{"names": [...], "weight_decay": ..., ...}, ...],      settings of each parameter group
     "state":  {name: {"step": ..., "exp_avg": ..., ...}}}             nothing for a parameter that was never updated

It is that of the innermost optimizers: one that works through another has no state of its own (wrapper.py), so
per-layer update can be switched on and off between two runs. An optimizer over pieces of the parameters calls them
layer.weight#0, layer.weight#1, ... (in_pieces.py). Names come from "param_names" of the parameter groups, which torch
keeps for an optimizer that was given named parameters; a tied parameter goes by its first name.

Checkpoints used to hold torch's state_dict, by index; `OptimizerState` converts it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sltrain.optim.wrapper import WrappedOptimizer, innermost
from sltrain.parameters import is_gain_or_bias

NamedState = dict[str, Any]  # as above


def named_parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    """Name -> parameter, of all groups in order. Raises ValueError for an optimizer that was given none."""
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        if len(group.get("param_names", ())) != len(group["params"]):
            raise ValueError(f"{type(optimizer).__name__} does not know its parameters' names; give named_parameters()")
        named.update(zip(group["param_names"], group["params"], strict=True))
    return named


def named_state(optimizer: Optimizer) -> NamedState:
    """The state by name. Its tensors are the optimizer's own, not copies."""
    leaves = innermost(optimizer)
    states = [(name, leaf.state.get(p)) for leaf in leaves for name, p in named_parameters(leaf).items()]
    groups = [group for leaf in leaves for group in leaf.param_groups]
    return {
        "class": _class_name(leaves),
        "groups": [{"names": list(group["param_names"]), **_settings(group)} for group in groups],
        "state": {name: dict(state) for name, state in states if state},
    }


def load_named_state(optimizer: Optimizer, saved: NamedState, strict: bool = True) -> None:
    """Make `saved` the optimizer's whole state; a group whose names are those of a saved group gets its settings too.

    Every tensor keeps its dtype, and one that lies where it is needed becomes the state itself. torch's load_state_dict
    casts floating state to the parameter's dtype (float32 moments of bfloat16 parameters would be rounded),
    bitsandbytes' copies everything first.

    Raises ValueError for the state of another class of optimizer and, if `strict`, for names that only one side has.
    Otherwise a parameter that is new to the state starts as in a new optimizer, and the state of one that is gone is
    dropped.
    """
    leaves = innermost(optimizer)
    named = {name: parameter for leaf in leaves for name, parameter in named_parameters(leaf).items()}
    _check_class(leaves, saved)
    if strict:
        _check_names(named, saved)
    place = _Placing(named.values())
    groups = {tuple(group["names"]): group for group in saved["groups"]}
    for leaf in leaves:
        leaf.state.clear()
        for group in leaf.param_groups:
            settings = groups.get(tuple(group["param_names"]), {})
            for key in _settings(group).keys() & settings.keys():  # torch's AdamW has settings that ours has not
                group[key] = place(settings[key], torch.device("cpu"))
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, value in saved["state"].get(name, {}).items():
                    leaf.state[parameter][key] = place(value, _device_of_state(key, parameter, group))


def reset_state(optimizer: Optimizer, names: Collection[str]) -> None:
    """Forget what the optimizer remembers of these parameters, moments and number of updates: each goes on as in a new
    optimizer. Raises ValueError for a name that it does not have."""
    unknown = set(names) - named_parameters(optimizer).keys()
    if unknown:
        raise ValueError(f"the optimizer has no parameter {min(unknown)}")
    for leaf in innermost(optimizer):
        for name, parameter in named_parameters(leaf).items():
            if _whole_name(name) in names:
                leaf.state.pop(parameter, None)


def rebuild_optimizer(old: Optimizer, build: Callable[[], Optimizer]) -> Optimizer:
    """What `build` makes for a model whose parameters have changed, with the state that `old` had.

    It is given to parameters by name. One that is new, or has another shape than under `old`, starts as in a new
    optimizer; the state of one that is gone is dropped. `old` is of no use afterwards.
    """
    shapes = {name: parameter.shape for name, parameter in named_parameters(old).items()}
    saved = named_state(old)
    if isinstance(old, WrappedOptimizer):
        old.close()
    new = build()
    kept = {name for name, parameter in named_parameters(new).items() if shapes.get(name) == parameter.shape}
    saved["state"] = {name: state for name, state in saved["state"].items() if _whole_name(name) in kept}
    load_named_state(new, saved, strict=False)
    for leaf in innermost(old):
        leaf.state.clear()
    return new


class OptimizerState:
    """An optimizer as one of the objects that a checkpoint holds: its named state, whichever format the file has.

    Args:
        optimizer: any optimizer of build.py.
        model_names: of the model's parameters, in its order, by which files of the first format are read.
    """

    def __init__(self, optimizer: Optimizer, model_names: Iterable[str]) -> None:
        self.optimizer = optimizer
        self.model_names = list(model_names)

    def state_dict(self) -> NamedState:
        return named_state(self.optimizer)

    def load_state_dict(self, state: NamedState) -> None:
        """Raises ValueError for the state of another optimizer or of other parameters."""
        load_named_state(self.optimizer, self._convert(state) if "state_dict" in state else state)

    def _convert(self, by_index: Mapping[str, Any]) -> NamedState:
        """The named state that a state_dict by index stands for. Its groups were the parameters that decay and the
        others, in the model's order."""
        groups, states = by_index["state_dict"]["param_groups"], by_index["state_dict"]["state"]
        numbers = {name: number for number, name in enumerate(self.model_names)}
        leaves = innermost(self.optimizer)
        _check_class(leaves, by_index)  # so there is one, as there was
        names = sorted(named_parameters(leaves[0]), key=lambda name: numbers[_whole_name(name)])
        by_group = [
            [name for name in names if is_gain_or_bias(_whole_name(name)) != decays] for decays in (True, False)
        ]
        by_group = [group for group in by_group if group]
        want, have = (
            " + ".join(str(len(group)) for group in each) for each in (by_group, [g["params"] for g in groups])
        )
        if want != have:
            raise ValueError(f"this run expects groups of {want} parameters, the file has groups of {have}")
        return {
            "class": by_index["class"],
            "groups": [
                {"names": group_names, **_settings(group)} for group_names, group in zip(by_group, groups, strict=True)
            ],
            "state": {
                name: _flat(states[index])
                for group_names, group in zip(by_group, groups, strict=True)
                for name, index in zip(group_names, group["params"], strict=True)
                if index in states
            },
        }


def _class_name(leaves: Sequence[Optimizer]) -> str:
    return " + ".join(type(leaf).__name__ for leaf in leaves)


def _check_class(leaves: Sequence[Optimizer], saved: Mapping[str, Any]) -> None:
    """Raise ValueError for the state of another class of optimizer."""
    if saved["class"] != (expected := _class_name(leaves)):
        raise ValueError(f"this run expects {expected}, the file has {saved['class']}")


def _check_names(named: Mapping[str, Tensor], saved: NamedState) -> None:
    """Raise ValueError if the state is one of other parameters."""
    have = {name for group in saved["groups"] for name in group["names"]}
    if differing := named.keys() ^ have:
        first = min(differing)
        whose = "this run trains it, the file does not" if first in named else "the file has it, this run does not"
        more = f" ({len(differing) - 1} more parameters differ)" if len(differing) > 1 else ""
        raise ValueError(f"parameter {first}: {whose}{more}")


class _Placing:
    """Puts values that another optimizer had, or that were read from a file, where they are needed.

    A tensor that is there already becomes the state itself; but in a run on another device than the CPU a tensor on the
    CPU may be a view of the mapped file, so it is copied. What parameters share (bitsandbytes' quantization maps) stays
    shared.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._is_all_on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
        self._copies: dict[int, Tensor] = {}  # by id of what was copied

    def __call__(self, value: Any, device: torch.device) -> Any:
        is_mapped = isinstance(value, Tensor) and value.device.type == "cpu" and not self._is_all_on_cpu
        if not isinstance(value, Tensor) or (value.device == device and not is_mapped):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(device, copy=True)
        return self._copies[id(value)]


def _device_of_state(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where one tensor of a parameter's state lives: with the parameter. A step count is read on the host, but by
    torch's fused and capturable optimizers on the device."""
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if on_host else parameter.device


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _whole_name(name: str) -> str:
    """The parameter that a piece belongs to; a whole parameter's own name."""
    return name.partition("#")[0]


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state as the state itself has it; bitsandbytes' state_dict wraps some of it in another dict."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {key: value})
    return flat
