"""What a method is told, and how a name pattern changes it for single layers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import nn

from sltrain.layers.convert import replace_linears


@dataclass
class MethodSettings:
    """Rank, sparsity, alpha and support of every replaced layer; an override maps a name pattern to another rank or
    sparsity.

    A pattern has the shell's wildcards and is held against a layer's full name and against each part between its dots:
    `q_proj`, `mlp`, `*_proj` and `model.layers.[01].*` all work. The last pattern that fits a layer wins.
    """

    rank: int
    sparsity: float  # the paper's delta: the fraction of the entries of S that are trained
    alpha: float
    support: str = "uniform"  # where those entries lie: see layers/support.py
    block_size: int | None = None  # of support block; None: by sparsity
    rank_overrides: dict[str, int] = field(default_factory=dict)
    sparsity_overrides: dict[str, float] = field(default_factory=dict)

    def resolve(self, name: str) -> tuple[int, float]:
        """(rank, sparsity) of the layer called `name`."""
        rank, sparsity = self.rank, self.sparsity
        for pattern, value in self.rank_overrides.items():
            rank = value if pattern_fits(pattern, name) else rank
        for pattern, fraction in self.sparsity_overrides.items():
            sparsity = fraction if pattern_fits(pattern, name) else sparsity
        return rank, sparsity

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise ValueError for an override that fits none of `names` (without any names there is nothing to check)."""
        names = list(names)
        for key in ("rank_overrides", "sparsity_overrides"):
            for pattern in getattr(self, key):
                if names and not any(pattern_fits(pattern, name) for name in names):
                    raise ValueError(
                        f"{key}: the pattern {pattern!r} fits no replaced layer; try for example {_examples(names)}"
                    )


@dataclass
class LayerSettings:
    """What one layer is made with."""

    rank: int
    sparsity: float
    like_linear: dict[str, Any]  # bias, device and dtype of the linear it replaces


class Method(Protocol):
    """One way to parametrize linears; each file of this folder but this one and advice.py is one."""

    def replace(
        self, model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]
    ) -> list[str]:
        """Replace in place the linears that `should_replace(name, linear)` picks; return their names."""


def pattern_fits(pattern: str, name: str) -> bool:
    """Whether `pattern` fits the full module name or one of its dotted parts."""
    return any(fnmatchcase(candidate, pattern) for candidate in [name, *name.split(".")])


def chosen_names(model: nn.Module, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Names of the linears that `should_replace` picks."""
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and should_replace(name, module)
    ]


def _examples(names: list[str]) -> str:
    """Two full names, then the kinds of layers there are."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return ", ".join(names[:2] + kinds[:8])


def replace_each(
    model: nn.Module,
    settings: MethodSettings,
    should_replace: Callable[[str, nn.Linear], bool],
    make: Callable[[nn.Linear, LayerSettings], nn.Module],
) -> list[str]:
    """Replace each chosen linear by what `make` returns; a ValueError of `make` gets the layer's name in front."""
    settings.check_patterns(chosen_names(model, should_replace))

    def make_named(name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight
        like_linear = {"bias": linear.bias is not None, "device": weight.device, "dtype": weight.dtype}
        try:
            return make(linear, LayerSettings(*settings.resolve(name), like_linear))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return replace_linears(model, should_replace, make_named)
