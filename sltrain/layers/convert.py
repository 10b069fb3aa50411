"""Replace linear layers inside any model, and put dense ones back.

    def make(name, linear):
        return SLTrainLinear(linear.in_features, linear.out_features, rank=128, sparsity=0.03, alpha=32)

    replace_linears(model, lambda name, linear: ".mlp." in name, make)

No model family is known here: a predicate over (name, linear) says which linears to replace, a constructor over the
same what replaces them. A module that occurs several times in the model (shared weights) is replaced by one new module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sltrain.layers.base import LAYERS, ReplacedLinear


class UnknownKind(ValueError):
    """A kind of layer that no installed package has."""


def replace_linears(
    model: nn.Module, should_replace: Callable[[str, nn.Linear], bool], make: Callable[[str, nn.Linear], nn.Module]
) -> list[str]:
    """Replace in place each nn.Linear that `should_replace(name, linear)` picks by `make(name, linear)`; return names.

    Names are those of `model.named_modules()`. The values of the replaced linear are lost, unless `make` takes them: a
    kind's `from_dense(linear.weight, rank=..., ...)` does. Raises ValueError if none was replaced.
    """
    names = _replace(model, lambda name, m: isinstance(m, nn.Linear) and should_replace(name, m), make)
    if not names:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = ", ".join(linears[:4]) + (", ..." if len(linears) > 4 else "") or "none"
        raise ValueError(f"no linear layer of {type(model).__name__} was chosen for replacement; it has: {found}")
    return names


@torch.no_grad()
def merge_to_dense(model: nn.Module) -> list[str]:
    """Replace in place every ReplacedLinear by an nn.Linear that computes the same; return names. Raises ValueError for
    a layer whose W is not one matrix."""

    def make(name: str, layer: ReplacedLinear) -> nn.Linear:
        weight, has_bias = layer.dense_weight(), layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().clone())
        return linear

    return _replace(model, lambda name, module: isinstance(module, ReplacedLinear), make)


def layer_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{name: kind and settings} of every ReplacedLinear: plain data, from which `restore_layers` rebuilds them."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ReplacedLinear)}
    return {name: {"kind": layer.kind, **layer.settings()} for name, layer in layers.items()}


def restore_layers(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace in place each named linear by the layer that its settings (`layer_settings`) describe. Raises ValueError
    for a name without a linear and for settings no layer can have, UnknownKind for a kind that is not installed.

    Settings of export format 1 name no kind: those with a sparsity are SLTrain's, the others low-rank.
    """

    installed = LAYERS.names()

    def make(name: str, linear: nn.Linear) -> nn.Module:
        own = dict(settings[name])
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        kind = own.pop("kind", "sltrain" if "sparsity" in own else "low_rank")
        if kind not in installed:
            raise UnknownKind(
                f"{name} is a layer of kind {kind}, which is not installed (there are: {', '.join(installed)}); install"
                " the package that brings it"
            )
        cls: Any = LAYERS.load(kind)
        try:
            return cls(linear.in_features, linear.out_features, bias=linear.bias is not None, **own, **like)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    if settings:
        missing = settings.keys() - set(replace_linears(model, lambda name, linear: name in settings, make))
        if missing:
            raise ValueError(f"the model has no linear called {min(missing)}")


def _replace(
    model: nn.Module, matches: Callable[[str, nn.Module], bool], make: Callable[[str, Any], nn.Module]
) -> list[str]:
    names: list[str] = []
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or not matches(name, module):  # the root has no parent to replace it in
            continue
        if module not in made:
            made[module] = make(name, module).train(module.training)
            names.append(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    return names
