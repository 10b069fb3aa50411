"""Maestro: W = B A with ordered dropout over its ranks, a penalty that empties the last ones, and cuts (Horvath,
Laskaridis, Rajput, Wang, arXiv 2308.14929, algorithm 1).

    every update         uses the first ranks only: of one layer, so many as are drawn (`sampler=one`), or of each layer
                         (`sampler=all`); the first update uses all
    gradients            get that of `penalty` times the group lasso of layers/ordered.py before the optimizer's step
    every `shrink_every` ranks whose importance is below `threshold` are cut, for good

As the authors' code does with its option --no-full-pass, an update has one forward, of the drawn ranks.
"""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Method, check_at_least, check_one_of, layers_of, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sltrain.engine.actions import Action, Moment, Running
    from sltrain.layers.ordered import OrderedLinear

logger = logging.getLogger(__name__)


@METHODS.register("maestro")
@dataclass
class Maestro(Method):
    """Options of method=maestro."""

    max_rank: int | None = None  # of a layer at the start; None: its smaller side
    sampler: str = "one"  # whose ranks are drawn: those of one layer, of all, or of none
    penalty: float = 1e-6  # strength of the group lasso beside the mean token loss; 0: none
    shrink_every: int = 1000  # updates from cut to cut; 0: none
    threshold: float = 1e-5  # importance of a rank, |A[b:]| |B[:, b:]|, below which it is cut
    gain: float = 1.0  # the start's standard deviation over model.initializer_range
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> max_rank

    def check(self) -> None:
        check_at_least(0, penalty=self.penalty, shrink_every=self.shrink_every, threshold=self.threshold)
        check_one_of(("one", "all", "none"), sampler=self.sampler)
        for name, rank in {"method.max_rank": self.max_rank, **self.rank_overrides}.items():
            if rank is not None and rank < 1:
                raise ValueError(f"{name}={rank}: must be at least 1")

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.ordered import OrderedLinear

        smaller = min(linear.in_features, linear.out_features)
        rank = resolve(self.max_rank, self.rank_overrides, name) or smaller
        return OrderedLinear(rank=rank, alpha=rank, **like)

    def against_ema(self) -> str | None:
        cuts = "cuts ranks, whose averages would not be 0, unless method.shrink_every=0"
        return cuts if self.shrink_every > 0 else None

    def acts_before_step(self) -> bool:
        return self.penalty > 0

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action, every
        from sltrain.layers.ordered import OrderedLinear

        layers = layers_of(running.model, OrderedLinear)

        def penalize() -> None:
            for layer in layers.values():
                layer.add_penalty(self.penalty)

        def after(moment: "Moment") -> None:
            if every(self.shrink_every)(moment.step):
                for layer in layers.values():
                    layer.shrink(self.threshold)
                kept = sum(layer.kept for layer in layers.values())
                logger.info(f"ranks      {kept:,} of {sum(layer.rank for layer in layers.values()):,} are left")
            for layer in layers.values():
                layer.clear_cut()
            draw(list(layers.values()), self.sampler, moment.generator)

        factors = [factor for layer in layers.values() for factor in (layer.A, layer.B)]
        # The norms of narrower numbers than float32 are taken of a copy; the penalty multiplies one factor by weights.
        copy = max((4 * p.numel() for p in factors if p.element_size() < 4), default=0) if self.shrink_every else 0
        largest = max((max(4, p.element_size()) * p.numel() for p in factors), default=0)
        before, held = (penalize, largest) if self.penalty > 0 else (None, 0)
        return [Action("ranks", every(1), after, copy, state=Ranks(layers), before=before, before_bytes=held)]


def draw(layers: "list[OrderedLinear]", sampler: str, generator: "torch.Generator") -> None:
    """Choose how many ranks of each layer the next update uses, uniformly from 1 to all that are kept."""
    import torch

    for layer in layers:
        layer.active = layer.kept
    total = sum(layer.kept for layer in layers)
    if sampler == "one" and total > 0:
        number = int(torch.randint(total, (), generator=generator))  # one of all pairs of a layer and its ranks
        for layer in layers:
            if 0 <= number < layer.kept:
                layer.active = number + 1
            number -= layer.kept
    if sampler == "all":
        for layer in layers:
            layer.active = int(torch.randint(layer.kept, (), generator=generator)) + 1 if layer.kept else 0


class Ranks:
    """How many ranks each layer has left, and how many the next update uses: what checkpoints hold of it."""

    def __init__(self, layers: "dict[str, OrderedLinear]") -> None:
        self.layers = layers

    def state_dict(self) -> dict[str, Any]:
        return {name: [layer.kept, layer.active] for name, layer in self.layers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            layer.kept, layer.active = state_dict[name]
