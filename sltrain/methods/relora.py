"""ReLoRA: low-rank updates of a frozen matrix, merged into it now and then (Lialin et al., arXiv 2307.05695).

    warm start     the first updates train W0 densely, as method=full would
    then           W = W0 + (alpha / rank) B A with W0 frozen, A uniform, B zero
    every n        W0 <- W0 + (alpha / rank) B A; A drawn again, B zero
    the moments    of B and A keep their largest 1 % there (magnitude), or as many at random, or begin again (reset)
    jagged rate    the learning rate climbs from 1/w of the schedule's value to all of it over w updates, after the warm
                   start and after every merge

Each merge can add another r directions to W0. n counts from the end of the warm start.

The published code prunes each moment by itself. Where the first stays and the second becomes zero, the next update
divides by eps, and training diverges: A has no gradient while B is zero. Here both stay or neither.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import (
    METHODS,
    Ranked,
    check_above_zero,
    check_at_least,
    check_frozen,
    check_one_of,
    dense_std,
    frozen_settings,
    layers_of,
    on_each,
)
from sltrain.methods.restarts import climb

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sltrain.engine.actions import Action, Moment, Phase, Running

MOMENTS = ("magnitude", "random", "reset", "keep")


@METHODS.register("relora")
@dataclass
class ReLoRA(Ranked):
    """Options of method=relora."""

    alpha: float = MISSING  # the product is scaled by alpha / rank
    warm_start: float = 0.25  # share of the updates that train W0; 0: none
    merge_every: int = 1000  # updates from merge to merge; 0: never (LoRA)
    merge_warmup: int = 50  # updates until the learning rate is that of the schedule; 0: at once
    moments: str = "magnitude"  # what becomes of the moments of B and A at a merge
    pruned: float = 0.99  # moments=magnitude, random: the share that becomes zero
    frozen_dtype: str = "auto"  # of W0: float32, bfloat16, or auto, that of the other weights
    frozen_rounding: str = "nearest"  # of a bfloat16 W0 that takes up a change; or stochastic, right on average

    def check(self) -> None:
        super().check()
        check_at_least(0, merge_every=self.merge_every, merge_warmup=self.merge_warmup)
        check_above_zero(alpha=self.alpha)
        check_frozen(self.frozen_dtype, self.frozen_rounding)
        if not 0 <= self.warm_start < 1:
            raise ValueError(f"method.warm_start={self.warm_start}: must be at least 0 and below 1, a share of the run")
        if 0 < self.merge_every < self.merge_warmup:
            raise ValueError(
                f"method.merge_warmup={self.merge_warmup} is not over before the next merge, after"
                f" method.merge_every={self.merge_every} updates; lower it, or merge less often"
            )
        check_one_of(MOMENTS, moments=self.moments)
        if not 0 < self.pruned < 1:
            raise ValueError(f"method.pruned={self.pruned}: must be above 0 and below 1; all of it is moments=reset")
        if self.pruned != 0.99 and self.moments in ("reset", "keep"):
            raise ValueError(f"method.pruned={self.pruned} is not read by method.moments={self.moments}; drop one")

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.relora import WarmLinear

        frozen = frozen_settings(self.frozen_dtype, self.frozen_rounding)
        return WarmLinear(linear, self.rank_of(name), self.alpha, **frozen)

    def exchanges_factors(self) -> bool:
        return self.merge_every > 0

    def lr_factor(self, step: int, max_steps: int) -> float:
        since, interval = step - 1 - self._warm_steps(max_steps), self.merge_every or max_steps
        if since < 0 or since == step - 1 < interval:  # still dense, or the beginning of a run without a warm start
            return 1.0
        return climb(since % interval, self.merge_warmup, 1 / max(1, self.merge_warmup))

    def phases(self, max_steps: int) -> "list[Phase]":
        from sltrain.engine.actions import Phase
        from sltrain.layers.convert import replace_linears
        from sltrain.layers.kinds.relora import ReLoRALinear, WarmLinear

        def change(model: "nn.Module") -> None:
            std = dense_std(model)

            def adapted(name: str, linear: "nn.Linear") -> "nn.Module":
                assert isinstance(linear, WarmLinear)
                return linear.adapted(std)

            replace_linears(model, lambda name, linear: isinstance(linear, WarmLinear), adapted)

        start = on_each(ReLoRALinear, ReLoRALinear.start_factors)
        return [Phase("adapters", self._warm_steps(max_steps), change, start)]

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action
        from sltrain.layers.kinds.relora import ReLoRALinear

        first = self._warm_steps(running.max_steps)
        layers = layers_of(running.model, ReLoRALinear)
        factors = [f"{name}.{factor}" for name in layers for factor in "AB"]

        def is_due(step: int) -> bool:
            return step > first and (step - first) % self.merge_every == 0

        def merge(moment: "Moment") -> None:
            for layer in layers.values():
                layer.merge(moment.generator)
            if self.moments == "reset":
                running.reset_state(factors)
            elif self.moments == "magnitude":
                running.change_moments(factors, lambda name, moments: prune_smallest(moments, self.pruned))
            elif self.moments == "random":
                running.change_moments(
                    factors, lambda name, moments: prune_random(moments, self.pruned, moment.generator)
                )

        if not layers or self.merge_every == 0:
            return []
        largest = max(factor.numel() for layer in layers.values() for factor in (layer.A, layer.B))
        # `prune_smallest`, with 8 for indices
        most = max(20 * largest, *(layer.absorb_bytes for layer in layers.values()))
        return [Action("merge", is_due, merge, temporary_bytes=most)]

    def _warm_steps(self, max_steps: int) -> int:
        return int(self.warm_start * max_steps)


def prune_smallest(moments: "list[Tensor]", share: float) -> None:
    """Set to zero, in place, what is not above the quantile `share` of the magnitudes in each of the moments of one
    tensor. In all of them: an update divides by the root of the second, which A, whose gradient is zero while B is,
    would not fill again before it is used."""
    import torch

    def is_large(moment: "Tensor") -> "Tensor":
        magnitudes = moment.abs().float()
        return magnitudes > magnitudes.flatten().kthvalue(int(share * (moment.numel() - 1)) + 1).values

    if moments:
        kept = torch.stack([is_large(moment) for moment in moments]).all(dim=0)
    for moment in moments:
        moment.mul_(kept)


def prune_random(moments: "list[Tensor]", share: float, generator: "torch.Generator") -> None:
    """Set each element of the moments of one tensor, the same in all, to zero with the probability `share`, in place;
    drawn on the CPU."""
    import torch

    if moments:
        kept = (torch.rand(moments[0].shape, generator=generator) > share).to(moments[0].device)
    for moment in moments:
        moment.mul_(kept)
