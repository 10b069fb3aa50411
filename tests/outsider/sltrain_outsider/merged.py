"""method=merged: a warm start of dense updates, then low-rank updates that are merged every few steps (after ReLoRA,
arXiv 2307.05695)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Method, replace_each

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sltrain.engine.actions import Action, Moment, Phase, Running
    from sltrain.methods.base import Chosen


@METHODS.register("merged")
@dataclass
class Merged(Method):
    """Options of method=merged."""

    rank: int = MISSING
    alpha: float = MISSING
    merge_every: int = MISSING  # updates between merges
    warm_fraction: float = 0.5  # of the run, before W0 is frozen

    def check(self) -> None:
        if self.merge_every < 1:
            raise ValueError(f"method.merge_every={self.merge_every}: must be at least 1")

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from sltrain_outsider.merged_linear import MergedLinear

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            return MergedLinear(linear.in_features, linear.out_features, self.rank, self.alpha, **like)

        return replace_each(model, chosen, make)

    def group_options(self, parameter: Any) -> dict[str, float]:
        return {"lr_scale": 2.0} if parameter.role == "factor" else {}

    def phases(self, max_steps: int) -> "list[Phase]":
        from sltrain.engine.actions import Phase

        def change(model: "nn.Module") -> None:
            for layer in layers_of(model):
                layer.add_factors()

        def start(model: "nn.Module", generator: "torch.Generator") -> None:
            for layer in layers_of(model):
                layer.start_factors(generator)

        return [Phase("factors", int(self.warm_fraction * max_steps), change, start)]

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action, every

        layers = {
            name: layer for name, layer in running.model.named_modules() if layer in set(layers_of(running.model))
        }
        count = Count()
        counting = Action("count", every(1), lambda moment: count.add(), state=count)
        if not all(layer.has_factors for layer in layers.values()):
            return [counting]

        def merge(moment: "Moment") -> None:
            for layer in layers.values():
                layer.merge(moment.generator)
            running.reset_state(f"{name}.{leaf}" for name in layers for leaf in ("A", "B"))

        first = next(iter(layers.values()))
        return [counting, Action("merge", every(self.merge_every), merge, temporary_bytes=first.W0.numel() * 8)]


class Count:
    """How many updates there were, over all phases and restarts."""

    def __init__(self) -> None:
        self.updates = 0

    def add(self) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


def layers_of(model: "nn.Module") -> "list[Any]":
    from sltrain_outsider.merged_linear import MergedLinear

    return [module for module in model.modules() if isinstance(module, MergedLinear)]
