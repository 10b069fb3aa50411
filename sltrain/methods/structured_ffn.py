"""Structured feed-forward layers (Wei et al., arXiv 2406.16450): W of each MLP projection is a product of two factors,
both dense, or one or both block-diagonal (layers/blocks.py); attention stays dense.

Self-guided training, over the first `guide_share` of the updates, of which there are T:

    y = g x G^T + (1 - g) x W^T      G dense, trained too, W at the start; in update t g = (1 + cos(pi t / T)) / 2

In update T the guide counts nothing, and then its memory is freed.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import (
    METHODS,
    Method,
    check_above_zero,
    check_at_least,
    check_one_of,
    layers_of,
    on_each,
    pattern_fits,
)

if TYPE_CHECKING:
    from torch import nn

    from sltrain.engine.actions import Action, Moment, Phase, Running
    from sltrain.methods.base import Chosen

# As in layers/blocks.py, which cannot be read from here: it imports torch.
STRUCTURES = ("low_rank", "block_dense", "block_shuffle")


@METHODS.register("structured_ffn")
@dataclass
class StructuredFFN(Method):
    """Options of method=structured_ffn."""

    structure: str = "low_rank"  # low_rank, block_dense (block-diagonal, then dense) or block_shuffle (two, shuffled)
    rank: int = MISSING  # inner size of low_rank and block_dense
    blocks: int = 4  # of a block-diagonal factor
    dense_layers: int = 1  # of the model, the first ones, whose MLP stays dense; the authors' code keeps one
    guided: bool = False  # self-guided training: a dense matrix beside each W at first
    guide_share: float = 0.5  # guided: of the updates, the first ones
    gain: float = 1.0  # the start of W is this many times the paper's

    def check(self) -> None:
        check_one_of(STRUCTURES, structure=self.structure)
        check_at_least(1, rank=self.rank, blocks=self.blocks)
        check_at_least(0, dense_layers=self.dense_layers)
        check_above_zero(gain=self.gain)
        if not 0 < self.guide_share <= 1:
            raise ValueError(
                f"method.guide_share={self.guide_share}: must be above 0 and at most 1; it is a share of the updates"
            )

    def multiplies_factors(self) -> bool:
        return self.structure == "low_rank"

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.aligned import AlignedLinear
        from sltrain.layers.kinds.structured_ffn import StructuredLinear

        if not self._is_structured(name):
            return AlignedLinear.of(linear)
        gain = 1.0 if self.structure == "low_rank" else self.gain  # of a start near a dense one `like` has it
        own: dict[str, Any] = {"structure": self.structure, "rank": self.rank, "blocks": self.blocks}
        return StructuredLinear(gain=gain, **own, **like)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        names = super().replace(model, chosen)
        if not any(map(self._is_structured, names)):
            raise ValueError(f"method.dense_layers={self.dense_layers} leaves no MLP to structure; choose fewer")
        return names

    def _is_structured(self, name: str) -> bool:
        is_dense = any(pattern_fits(f"*layers.{number}.*", name) for number in range(self.dense_layers))
        return pattern_fits("mlp", name) and not is_dense

    def phases(self, max_steps: int) -> "list[Phase]":
        """With and without the guide. The first name says how long, so that `extend` changes no share that was."""
        from sltrain.engine.actions import Phase
        from sltrain.layers.kinds.structured_ffn import StructuredLinear

        if not self.guided:
            return []
        num = self._num_guided(max_steps)
        add, drop = (on_each(StructuredLinear, do) for do in (StructuredLinear.add_guide, StructuredLinear.drop_guide))
        start = on_each(StructuredLinear, lambda layer, generator: layer.start_guide(share(1, num)))
        return [Phase(f"guide for {num}", 0, add, start), Phase("structured alone", num, drop)]

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action
        from sltrain.layers.kinds.structured_ffn import StructuredLinear

        layers = [layer for layer in layers_of(running.model, StructuredLinear).values() if layer.has_guide]
        num = self._num_guided(running.max_steps)

        def fade(moment: "Moment") -> None:
            for layer in layers:
                layer.share.fill_(share(moment.step + 1, num))

        return [Action("fade", lambda step: step < num, fade)] if layers else []

    def _num_guided(self, max_steps: int) -> int:
        return max(1, round(self.guide_share * max_steps))


def share(update: int, num_guided: int) -> float:
    """What the guide counts in this update, from 1, of `num_guided`."""
    return 0.5 * (1 + math.cos(math.pi * update / num_guided))
