"""An optimizer by its name and settings, as several test files make it."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from omegaconf import MISSING
from torch import nn
from torch.optim import Optimizer

from sltrain.optim.build import build_optimizer
from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig

# Those that update one tensor at a time; the others need A and B of a layer together.
ALONE = [name for name in OPTIMIZERS.names() if not OPTIMIZERS.load(name).whole_update]


def make_options(name: str, **options: Any) -> OptimizerConfig:
    """The options of `optimizer=name`, the given ones as far as it has them; a rank that has no default is 4."""
    kind = OPTIMIZERS.load(name)
    known = {item.name for item in fields(kind)}
    needed = {item.name: 4 for item in fields(kind) if item.name == "rank" and item.default == MISSING}
    return kind(name=name, **needed | {key: value for key, value in options.items() if key in known})


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], *, name: str, **how: Any) -> Optimizer:
    """`build_optimizer` with the options betas, eps and moments_dtype among its settings."""
    options = {key: how.pop(key) for key in ("betas", "eps", "moments_dtype") if key in how}
    return build_optimizer(named, make_options(name, **options), **how)
