"""An optimizer by its name and settings, as several test files make it."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sltrain.optim.build import build_optimizer
from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig


def make_options(name: str, **options: Any) -> OptimizerConfig:
    """The options of `optimizer=name`, the given ones as far as it has them."""
    kind = OPTIMIZERS.load(name)
    known = {item.name for item in fields(kind)}
    return kind(name=name, **{key: value for key, value in options.items() if key in known})


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], *, name: str, **how: Any) -> Optimizer:
    """`build_optimizer` with the options betas, eps and moments_dtype among its settings."""
    options = {key: how.pop(key) for key in ("betas", "eps", "moments_dtype") if key in how}
    return build_optimizer(named, make_options(name, **options), **how)
