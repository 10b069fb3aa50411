"""Start-up warnings about the layers of a model, and the norms of their parts for the log."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sltrain.layers import ReplacedLinear

Whole = Callable[[nn.Module], AbstractContextManager[Any]]

ALWAYS = ("low_rank", "sparse")  # groups whose norm is logged even if no layer has such a part


def warnings(model: nn.Module) -> list[str]:
    """A line if layers train no fewer values than a dense matrix, and the layers' own warnings, one line a topic."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ReplacedLinear)}
    lines = []
    heavy = [
        name
        for name, layer in layers.items()
        if layer.num_trained >= layer.in_features * layer.out_features and not layer.held_in_codes()  # fewer bytes
    ]
    if heavy:
        first = layers[heavy[0]]
        lines.append(
            f"{len(heavy)} of {len(layers)} layers train no fewer values than a dense matrix (the first, {heavy[0]}: "
            f"{first.num_trained:,} for {first.out_features} x {first.in_features}): lower rank or sparsity there"
        )
    own: dict[str, str] = {}
    for layer in layers.values():
        own = {**layer.warnings(), **own}  # the first layer's line stays
    return [*lines, *own.values()]


@torch.no_grad()
def weight_norms(model: nn.Module, whole: Whole = nullcontext) -> dict[str, float]:
    """Frobenius norms of the low-rank, sparse and other parts of W, each over all layers: {"low_rank_norm": ...}; empty
    for a model without replaced layers. In the context `whole(layer)` the layer's tensors are whole."""
    layers = [layer for layer in model.modules() if isinstance(layer, ReplacedLinear) and layer.is_mergeable]
    if not layers:
        return {}
    zero = torch.zeros((), device=next(layers[0].parameters()).device)
    of_layers: list[dict[str, torch.Tensor]] = []
    for layer in layers:
        own: dict[str, torch.Tensor] = {}
        with whole(layer):
            for part in layer.parts().values():
                own[part.group] = own.get(part.group, zero) + part.norm().square()
        of_layers.append(own)
    groups = list(dict.fromkeys([*ALWAYS, *(group for own in of_layers for group in own)]))
    squares = torch.stack([torch.stack([own.get(group, zero) for group in groups]) for own in of_layers])
    norms = squares.sum(0).sqrt().tolist()
    return {f"{group}_norm": norm for group, norm in zip(groups, norms, strict=True)}
