"""SwitchLoRA: low-rank updates of a frozen matrix, whose vectors are exchanged a few at a time, all through the run
(Zhou et al., arXiv 2406.06564, algorithms 1 and 2).

    W = W0 + (alpha / rank) B A, W0 frozen. After update t, in each layer:

    how many    r / switch_every * 0.3^((t + 1) / (switch_decay * updates of the run)) rows of A, and as many columns
                of B, rounded up or down at random so that the mean is right
    exchange    each for the next of its candidates; W0 takes up the difference, so W stays
    counterpart the column of B that a new row is multiplied by, and the row of a new column: its first moment becomes
                zero, and it is frozen for `freeze` updates. What was learned about it belonged to the other vector.

The authors reset second moments, too, and count updates a vector for Adam's bias correction. Optimizers here count them
a tensor: a second moment of zero would then make steps several times too large, so the second moments stay.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import (
    METHODS,
    Ranked,
    check_above_zero,
    check_at_least,
    check_frozen,
    check_ranks,
    frozen_settings,
    layers_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sltrain.engine.actions import Action, Moment, Running


@METHODS.register("switchlora")
@dataclass
class SwitchLoRA(Ranked):
    """Options of method=switchlora."""

    alpha: float = 1.0  # the product is scaled by alpha / rank; the start is made for 1
    candidates: int | None = None  # vectors of A, and of B, to exchange among; None: the smaller side of each matrix
    switch_every: float = 40.0  # updates in which every vector is exchanged once, at the beginning; 0: never (LoRA)
    switch_decay: float = 0.1  # share of the run after which exchanges are 0.3 as frequent
    freeze: int = 5  # updates without gradient of a counterpart
    frozen_dtype: str = "auto"  # of W0: float32, bfloat16, or auto, that of the other weights
    frozen_rounding: str = "nearest"  # of a bfloat16 W0 that takes up a change; or stochastic, right on average

    def check(self) -> None:
        check_at_least(0, switch_every=self.switch_every, freeze=self.freeze)
        check_at_least(1, candidates=self.candidates)
        check_above_zero(alpha=self.alpha, switch_decay=self.switch_decay)
        check_frozen(self.frozen_dtype, self.frozen_rounding)
        check_ranks("switchlora", self.rank, self.rank_overrides, least=2, why=": a pair would be exchanged")
        if 0 < self.switch_every < max(2 * self.freeze, 1):
            raise ValueError(
                f"method.switch_every={self.switch_every:g} is less than twice method.freeze={self.freeze}: more than"
                " half of the vectors would always be frozen; exchange less often, or freeze for less"
            )

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.switchlora import SwitchLoRALinear

        own = frozen_settings(self.frozen_dtype, self.frozen_rounding) | {"candidates": self.candidates}
        return SwitchLoRALinear(rank=self.rank_of(name), alpha=self.alpha, **own, **like)

    def exchanges_factors(self) -> bool:
        return self.switch_every > 0

    def changes_vectors(self) -> bool:
        return self.switch_every > 0

    def agrees(self, step: int, before: int, after: int) -> bool:
        return before == after or step == 0 or self.switch_every == 0

    def expected(self, rank: int, step: int, max_steps: int) -> float:
        """How many vectors of a factor are exchanged after update `step`, on average."""
        return rank / self.switch_every * 0.3 ** ((step + 1) / (self.switch_decay * max_steps))

    def actions(self, running: "Running") -> "list[Action]":
        import torch

        from sltrain.engine.actions import Action, every
        from sltrain.layers.kinds.switchlora import SwitchLoRALinear

        layers = layers_of(running.model, SwitchLoRALinear)

        def switch(moment: "Moment") -> None:
            draws = torch.rand(len(layers), generator=moment.generator).tolist()
            reset: dict[str, tuple[Tensor | slice, ...]] = {}  # factor -> index of its counterparts
            for (name, layer), draw in zip(layers.items(), draws, strict=True):
                layer.pass_update()
                wanted = int(self.expected(layer.rank, moment.step, running.max_steps) + draw)
                if wanted > 0:
                    columns, rows = layer.switch(wanted, self.freeze, moment.generator)
                    reset |= {f"{name}.A": (rows,), f"{name}.B": (slice(None), columns)}

            def forget(name: str, moments: "list[Tensor]") -> None:
                for first in moments[:1]:
                    first[reset[name]] = 0

            running.change_moments(reset, forget)

        if self.switch_every == 0:
            return []
        size = max(
            (4 * m.rank * max(m.W0.shape) * m.A.element_size() + m.absorb_bytes for m in layers.values()), default=0
        )
        return [Action("switch", every(1), switch, temporary_bytes=size)]
