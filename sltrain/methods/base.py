"""A method says how attention and MLP projections are parametrized. It is one file:

    @METHODS.register("low_rank")
    @dataclass
    class LowRank(Method):
        rank: int = MISSING                       # the keys under `method.`, with defaults in conf/method/low_rank.yaml
        def replace(self, model, chosen): ...     # puts its layers in place of the chosen linears

`method=NAME` chooses it, and `config.method` is the object. This file and the files of methods import torch only inside
functions: a mistyped key is refused before torch is loaded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from sltrain.engine.actions import Action, Phase, Running
    from sltrain.parameters import ParamInfo

    Chosen = Callable[[str, nn.Linear], bool]  # (name, linear) -> whether a method replaces this linear


@dataclass
class Method:
    """The face of a method. Fields of a subclass are its options; only `replace` must be defined."""

    name: str = MISSING

    def check(self) -> None:
        """Raise ValueError, naming key, value and remedy, for options that do not go together."""

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        """Replace in place the linears that `chosen(name, linear)` picks; return their names. The model may be on the
        meta device. Raises ValueError for options a layer cannot have, and if no linear was chosen."""
        raise TypeError(f"{type(self).__name__} does not say what it replaces linears by")

    def group_options(self, parameter: "ParamInfo") -> dict[str, float]:
        """Settings of the optimizer for one parameter that differ from the run's: {"lr_scale": 0.5} halves its
        learning rate, {"weight_decay": 0.0} keeps it from decaying."""
        return {}

    def actions(self, running: "Running") -> "list[Action]":
        """What happens between updates, see engine/actions.py. Called again when a phase has changed the model."""
        return []

    def phases(self, max_steps: int) -> "list[Phase]":
        """The parts of a run of `max_steps` updates in which the model has another structure, see engine/actions.py."""
        return []

    def columns(self) -> dict[str, Any]:
        """The options that the start-up line, the table of a report and the model card show, in this order."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        return {key: value for key, value in shown.items() if isinstance(value, int | float | str)}


METHODS: Registry[Method] = Registry("method", "sltrain.methods", "sltrain.methods", helpers=("base", "advice"))


def pattern_fits(pattern: str, name: str) -> bool:
    """Whether a pattern with the shell's wildcards fits the full module name or one of its dotted parts: `q_proj`,
    `mlp`, `*_proj` and `model.layers.[01].*` all work."""
    return any(fnmatchcase(candidate, pattern) for candidate in [name, *name.split(".")])


def resolve(value: Any, overrides: dict[str, Any], name: str) -> Any:
    """The value of one layer: that of the last override whose pattern fits its name, or the method's own."""
    fitting = [override for pattern, override in overrides.items() if pattern_fits(pattern, name)]
    return fitting[-1] if fitting else value


def check_patterns(key: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise ValueError for a pattern that fits none of the replaced layers (without layers nothing is checked)."""
    for pattern in patterns:
        if names and not any(pattern_fits(pattern, name) for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in names})
            examples = ", ".join(names[:2] + kinds[:8])
            raise ValueError(f"{key}: the pattern {pattern!r} fits no replaced layer; try for example {examples}")


def chosen_names(model: "nn.Module", chosen: "Chosen") -> list[str]:
    """Names of the linears that `chosen` picks."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and chosen(name, module)]


def replace_each(
    model: "nn.Module", chosen: "Chosen", make: "Callable[[str, nn.Linear, dict[str, Any]], nn.Module]"
) -> list[str]:
    """Replace each chosen linear by `make(name, linear, like)`, where `like` holds bias, device and dtype for a layer
    like this linear. A ValueError of `make` gets the layer's name in front."""
    from sltrain.layers.convert import replace_linears

    def make_named(name: str, linear: "nn.Linear") -> "nn.Module":
        weight = linear.weight
        like = {"bias": linear.bias is not None, "device": weight.device, "dtype": weight.dtype}
        try:
            return make(name, linear, like)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return replace_linears(model, chosen, make_named)
