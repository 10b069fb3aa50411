"""An optimizer's state by parameter name, as a checkpoint stores it and as it survives a change of the model.

    {"class":  name of the optimizer's class; of several, joined by " + ",
     "groups": [{"names": [...], "weight_decay": ..., ...}, ...],      settings of each parameter group
     "state":  {name: {"step": ..., "exp_avg": ..., ...}}}             nothing for a parameter that was never updated

It is that of the innermost optimizers: one that works through another has no state of its own (wrapper.py), so
per-layer update can be switched on and off between two runs. An optimizer over pieces of the parameters calls them
layer.weight#0, layer.weight#1, ... (in_pieces.py). Names come from "param_names" of the parameter groups, which torch
keeps for an optimizer that was given named parameters; a tied parameter has its first name.

Checkpoints of the first format hold torch's state_dict, by index; `OptimizerState` converts it.
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
    """Name -> parameter, of all groups in order. Raises ValueError for an optimizer that was given no names."""
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
    """Make `saved` the optimizer's whole state. A group with the names of a saved group gets its settings too.

    Tensors keep their dtype, and one that is where it is needed becomes the state itself. torch's load_state_dict casts
    floating state to the parameter's dtype (float32 moments of bfloat16 parameters would be rounded); bitsandbytes'
    copies everything first.

    Raises ValueError, if `strict`, for the state of another class of optimizer and for names that only one side has.
    Otherwise a new parameter starts as in a new optimizer, and the state of a missing one is dropped.
    """
    leaves = innermost(optimizer)
    named = {name: parameter for leaf in leaves for name, parameter in named_parameters(leaf).items()}
    if strict:
        _check_class(leaves, saved)
    have = {name for group in saved["groups"] for name in group["names"]}
    if strict and (differing := named.keys() ^ have):
        first = min(differing)
        whose = "this run trains it, the file does not" if first in named else "the file has it, this run does not"
        more = f" ({len(differing) - 1} more parameters differ)" if len(differing) > 1 else ""
        raise ValueError(f"parameter {first}: {whose}{more}")
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in named.values())
    copies: dict[int, Tensor] = {}  # by id: what parameters share (bitsandbytes' quantization maps) stays shared

    def place(value: Any, device: torch.device) -> Any:
        """The value on `device`. In a run on a GPU a tensor on the CPU may be a view of a mapped file: it is copied."""
        if not isinstance(value, Tensor) or (value.device == device and (is_on_cpu or device.type != "cpu")):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.to(device, copy=True)
        return copies[id(value)]

    groups = {tuple(group["names"]): group for group in saved["groups"]}
    for leaf in leaves:
        leaf.state.clear()
        for group in leaf.param_groups:
            settings = groups.get(tuple(group["param_names"]), {})
            for key in _settings(group).keys() & settings.keys():  # torch's AdamW has settings that ours lacks
                group[key] = place(settings[key], torch.device("cpu"))
            # A step count is on the host, where it is read; torch's fused and capturable optimizers read it elsewhere.
            counts_on_host = not (group.get("fused") or group.get("capturable"))
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, value in saved["state"].get(name, {}).items():
                    device = torch.device("cpu") if key == "step" and counts_on_host else parameter.device
                    leaf.state[parameter][key] = place(value, device)


def reset_state(optimizer: Optimizer, names: Collection[str]) -> None:
    """Drop the state of these parameters, moments and number of updates: each continues as in a new optimizer. Raises
    ValueError for an unknown name."""
    unknown = set(names) - named_parameters(optimizer).keys()
    if unknown:
        raise ValueError(f"the optimizer has no parameter {min(unknown)}")
    for leaf in innermost(optimizer):
        for name, parameter in named_parameters(leaf).items():
            if _whole_name(name) in names:
                leaf.state.pop(parameter, None)


def change_moments(
    optimizer: Optimizer, names: Collection[str], change: Callable[[str, list[Tensor]], None]
) -> list[str]:
    """Apply `change(name, moments)`, which works in place, to each of these parameters, or to each piece of one: the
    moments are floating tensors of its shape, in the optimizer's order. Where moments are held in another form, as
    codes and scales, the state is dropped instead; return the names of these parameters. Raises ValueError for an
    unknown name."""
    moments: dict[str, list[list[Tensor]]] = {}
    quantized: dict[str, None] = {}
    for leaf in innermost(optimizer):
        for piece, parameter in named_parameters(leaf).items():
            if (name := _whole_name(piece)) in names:
                held = [v for k, v in leaf.state.get(parameter, {}).items() if isinstance(v, Tensor) and k != "step"]
                moments.setdefault(name, []).append(held)
                if not all(v.is_floating_point() and v.shape == parameter.shape for v in held):
                    quantized[name] = None
    reset_state(optimizer, [*quantized, *(set(names) - moments.keys())])
    for name, of_pieces in moments.items():
        for held in of_pieces if name not in quantized else ():
            change(name, held)
    return list(quantized)


def rebuild_optimizer(old: Optimizer, build: Callable[[], Optimizer]) -> Optimizer:
    """The result of `build`, for a model whose parameters have changed, with the state of `old`, by name.

    A new parameter, or one that has another shape or another class of optimizer than under `old`, starts as in a new
    optimizer; the state of a missing one is dropped. `old` cannot be used afterwards.
    """
    before = _owners(old)
    saved = named_state(old)
    if isinstance(old, WrappedOptimizer):
        old.close()
    new = build()
    kept = {name for name, owner in _owners(new).items() if before.get(name) == owner}
    saved["state"] = {name: state for name, state in saved["state"].items() if _whole_name(name) in kept}
    load_named_state(new, saved, strict=False)
    for leaf in innermost(old):
        leaf.state.clear()
    return new


def _owners(optimizer: Optimizer) -> dict[str, tuple[torch.Size, str]]:
    """Of each whole parameter by name: its shape, and the class of the optimizer that has its state."""
    classes = {
        _whole_name(name): type(leaf).__name__ for leaf in innermost(optimizer) for name in named_parameters(leaf)
    }
    return {name: (parameter.shape, classes[name]) for name, parameter in named_parameters(optimizer).items()}


class OptimizerState:
    """An optimizer as an object of a checkpoint: its named state, from a file of either format.

    Args:
        optimizer: any optimizer of build.py.
        model_names: of the model's parameters, in its order; needed for files of the first format.
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
        """The named state of a state_dict by index. Its groups were the parameters that decay and the others, in the
        model's order."""
        groups, states = by_index["state_dict"]["param_groups"], by_index["state_dict"]["state"]
        numbers = {name: number for number, name in enumerate(self.model_names)}
        leaves = innermost(self.optimizer)
        _check_class(leaves, by_index)  # so there is one, as there was
        names = sorted(named_parameters(leaves[0]), key=lambda name: numbers[_whole_name(name)])
        decays = [[name for name in names if is_gain_or_bias(_whole_name(name)) == fixed] for fixed in (False, True)]
        named = [group for group in decays if group]
        want = " + ".join(str(len(group)) for group in named)
        have = " + ".join(str(len(group["params"])) for group in groups)
        if want != have:
            raise ValueError(f"this run expects groups of {want} parameters, the file has groups of {have}")
        pairs = list(zip(named, groups, strict=True))
        index = {name: i for names, group in pairs for name, i in zip(names, group["params"], strict=True)}
        return {
            "class": by_index["class"],
            "groups": [{"names": names, **_settings(group)} for names, group in pairs],
            "state": {name: _flat(states[i]) for name, i in index.items() if i in states},
        }


def _class_name(leaves: Sequence[Optimizer]) -> str:
    return " + ".join(type(leaf).__name__ for leaf in leaves)


def _check_class(leaves: Sequence[Optimizer], saved: Mapping[str, Any]) -> None:
    """Raise ValueError for the state of another class of optimizer."""
    if saved["class"] != (expected := _class_name(leaves)):
        raise ValueError(f"this run expects {expected}, the file has {saved['class']}")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _whole_name(name: str) -> str:
    """The parameter of a piece; a whole parameter's own name."""
    return name.partition("#")[0]


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state, without the inner dict that bitsandbytes' state_dict puts some of it into."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {key: value})
    return flat
