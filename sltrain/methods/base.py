"""The interface of a method, which parametrizes attention and MLP projections. It is one file:

    @METHODS.register("low_rank")
    @dataclass
    class LowRank(Method):
        rank: int = MISSING                      # the keys under `method.`, with defaults in conf/method/low_rank.yaml
        def layer(self, name, linear, like): ... # what takes the place of a linear

`method=NAME` chooses it, and `config.method` is the object. This file and the files of methods import torch only inside
functions, so that a mistyped key is reported before torch is loaded.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import MISSING

from sltrain.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from sltrain.engine.actions import Action, Phase, Running
    from sltrain.parameters import ParamInfo

    Chosen = Callable[[str, nn.Linear], bool]  # (name, linear) -> whether a method replaces this linear

L = TypeVar("L")


@dataclass
class Method:
    """A method. Fields of a subclass are its options; only `layer` must be defined, or `replace`."""

    name: str = MISSING

    def check(self) -> None:
        """Raise ValueError, naming key, value and remedy, for options out of range or in contradiction."""

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        """What takes the place of a chosen linear. `like` are arguments of a layer (layers/started.py): the linear's
        sides, bias, device and dtype, and the standard deviation of a dense start, `gain` included."""
        raise TypeError(f"{type(self).__name__} defines neither layer() nor replace()")

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        """Replace in place the linears that `chosen(name, linear)` picks, keeping device and dtype (meta included);
        return their names. Raises ValueError for options a layer cannot have, for an override whose pattern fits no
        layer, and if no linear was chosen."""
        std = dense_std(model, getattr(self, "gain", 1.0))
        overrides = {each.name: getattr(self, each.name) for each in fields(self) if each.name.endswith("_overrides")}

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            sides = {"in_features": linear.in_features, "out_features": linear.out_features}
            return self.layer(name, linear, {**sides, **like, "init_std": std})

        return replace_each(model, chosen, make, overrides)

    def num_calibration_rows(self) -> int:
        """Rows of the training text that go through the model while it takes the weights of `init_from`: each layer's
        `fit` (layers/base.py) is then told the inputs that it sees. 0: none, and `set_weight` is called."""
        return 0

    def against_random_start(self) -> str | None:
        """Why a run without `init_from` is refused, with the remedy; None: it is not."""
        return None

    def group_options(self, parameter: "ParamInfo") -> dict[str, float]:
        """Optimizer settings of one parameter that differ from the run's: {"lr_scale": 0.5} halves its learning rate,
        {"weight_decay": 0.0} exempts it from decay."""
        return {}

    def lr_factor(self, step: int, max_steps: int) -> float:
        """What the schedule's learning rate of update `step`, from 1, is multiplied by: to warm up again after a
        restart, for instance."""
        return 1.0

    def exchanges_factors(self) -> bool:
        """Whether its actions put other factors in the place of B and A while W stays. `ema` is then refused: averages
        of B and of A, each by itself, would make no average of W."""
        return False

    def against_ema(self) -> str | None:
        """Why `ema` is refused, in words that follow the method's name; None: it is not."""
        if not self.exchanges_factors():
            return None
        return "exchanges B and A now and then while W stays: their averages would be no average of W"

    def against_spectral(self) -> str | None:
        """Why parametrization=spectral is refused, with the remedy; None: it is not, since building/parametrization.py
        knows the tensors of its layers."""
        return f"method={self.name} is not one of those that it has rules for; set method=full, low_rank or sltrain"

    def agrees(self, step: int, before: int, after: int) -> bool:
        """Whether a run of `before` updates does in its first `step` what one of `after` does, phases apart. Runs are
        extended only then (`extend=`)."""
        return all(self.lr_factor(each, before) == self.lr_factor(each, after) for each in range(1, step + 1))

    def changes_vectors(self) -> bool:
        """Whether its actions change the moments of single rows or columns. An optimizer without `whole_moments` is
        then refused."""
        return False

    def acts_before_step(self) -> bool:
        """Whether an action of its has a `before`. per_layer_update, which has no moment between backward and the
        optimizer's step, is then refused."""
        return False

    def actions(self, running: "Running") -> "list[Action]":
        """Actions between updates, see engine/actions.py. Called again after a phase has changed the model."""
        return []

    def phases(self, max_steps: int) -> "list[Phase]":
        """The parts of a run of `max_steps` updates in which the model's structure differs, see engine/actions.py."""
        return []

    def multiplies_factors(self) -> bool:
        """Whether the A and B of a layer stand for the product B A, which optimizers of pairs rely on."""
        return True

    def columns(self) -> dict[str, Any]:
        """The options shown by the start-up line, the table of a report and the model card, in this order."""
        shown = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        return {key: value for key, value in shown.items() if isinstance(value, int | float | str)}


@dataclass
class Ranked(Method):
    """A method whose layers have a rank of at least 1."""

    rank: int = MISSING  # of each layer: the inner size of B A
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank

    def check(self) -> None:
        super().check()
        check_ranks(self.name, self.rank, self.rank_overrides)

    def rank_of(self, name: str) -> int:
        """The rank of one layer."""
        rank: int = resolve(self.rank, self.rank_overrides, name)
        return rank


METHODS: Registry[Method] = Registry(
    "method", "sltrain.methods", "sltrain.methods", helpers=("base", "advice", "regrow", "restarts")
)

# Between two factors. layers/activated.py has the functions, and cannot be read from here: it imports torch.
ACTIVATIONS = ("silu", "gelu", "relu", "none")
# As in layers/adapted.py, which imports torch too.
FROZEN_DTYPES, ROUNDINGS = ("float32", "bfloat16"), ("nearest", "stochastic")


def check_at_least(least: float, **options: float | None) -> None:
    """Raise ValueError for an option of a method below `least`; None is no value."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"method.{name}={value}: must be at least {least:g}")


def check_above_zero(**options: float) -> None:
    """Raise ValueError for an option of a method that is not a number above 0."""
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"method.{name}={value}: must be a number above 0")


def check_residual(residual: float) -> None:
    """Raise ValueError for a strength of DLR's residual that is no number."""
    if not math.isfinite(residual):
        raise ValueError(f"method.residual={residual}: must be a number, such as 1 (the paper's)")


def check_one_of(choices: Iterable[str], **options: str) -> None:
    """Raise ValueError for an option of a method that is none of these words."""
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"method.{name}={value}: choose one of {', '.join(choices)}")


def check_frozen(frozen_dtype: str, frozen_rounding: str = "nearest") -> None:
    """Raise ValueError for the options of a frozen W0 (layers/adapted.py) that are unknown or in contradiction."""
    check_one_of(("auto", *FROZEN_DTYPES), frozen_dtype=frozen_dtype)
    check_one_of(ROUNDINGS, frozen_rounding=frozen_rounding)
    if frozen_rounding == "stochastic" and frozen_dtype == "float32":
        raise ValueError(
            "method.frozen_rounding=stochastic is for a W0 in bfloat16, and method.frozen_dtype=float32; drop one"
        )


def frozen_settings(frozen_dtype: str, frozen_rounding: str = "nearest") -> dict[str, Any]:
    """The same as settings of a layer; none for what is usual."""
    own = {} if frozen_dtype == "auto" else {"frozen_dtype": frozen_dtype}
    return own if frozen_rounding == "nearest" else {**own, "frozen_rounding": frozen_rounding}


def check_ranks(method: str, rank: int, overrides: Mapping[str, int], least: int = 1, why: str = "") -> None:
    """Raise ValueError for a rank, or one for single layers, below `least`; the line ends with `why`."""
    for name, value in {"rank": rank, **overrides}.items():
        if value < least:
            raise ValueError(f"method={method} needs rank above {least - 1}, and {name} is {value}{why}")


def pattern_fits(pattern: str, name: str) -> bool:
    """Whether a pattern with shell wildcards fits the module name or one of its dotted parts, such as `q_proj`, `mlp`,
    `*_proj`, `model.layers.[01].*`."""
    return any(fnmatchcase(candidate, pattern) for candidate in [name, *name.split(".")])


def resolve(value: Any, overrides: dict[str, Any], name: str) -> Any:
    """The value of one layer: that of the last override whose pattern fits its name, else `value`."""
    fitting = [override for pattern, override in overrides.items() if pattern_fits(pattern, name)]
    return fitting[-1] if fitting else value


def dense_std(model: "nn.Module", gain: float = 1.0) -> float:
    """`gain` times the standard deviation of the model's dense start."""
    return gain * getattr(getattr(model, "config", None), "initializer_range", 0.02)


def layers_of(model: "nn.Module", kind: type[L]) -> dict[str, L]:
    """The layers of a class by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def on_each(kind: type[Any], do: Callable[..., None]) -> Callable[..., None]:
    """A function of a model that calls `do(layer, ...)` for each of its layers of a class; for phases."""

    def do_on_each(model: "nn.Module", *given: Any) -> None:
        for layer in layers_of(model, kind).values():
            do(layer, *given)

    return do_on_each


def replace_each(
    model: "nn.Module",
    chosen: "Chosen",
    make: "Callable[[str, nn.Linear, dict[str, Any]], nn.Module]",
    overrides: Mapping[str, Iterable[str]] | None = None,
) -> list[str]:
    """Replace each chosen linear by `make(name, linear, like)`, where `like` are the linear's bias, device and dtype as
    arguments of a layer; return names. Raises ValueError if none was chosen, for a pattern in `overrides` (key of the
    configuration -> patterns) that fits no chosen linear, and as `make`, with the name of the layer."""
    from torch import nn

    from sltrain.layers.convert import replace_linears

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name, linear in linears.items() if chosen(name, linear)]
    for key, patterns in (overrides or {}).items():
        for pattern in patterns:
            if names and not any(pattern_fits(pattern, name) for name in names):
                kinds = sorted({name.rpartition(".")[2] for name in names})
                examples = ", ".join(names[:2] + kinds[:8])
                raise ValueError(f"{key}: the pattern {pattern!r} fits no replaced layer; try for example {examples}")

    def make_named(name: str, linear: "nn.Linear") -> "nn.Module":
        weight = linear.weight
        like = {"bias": linear.bias is not None, "device": weight.device, "dtype": weight.dtype}
        try:
            return make(name, linear, like)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return replace_linears(model, chosen, make_named)
