"""An S whose positions move while it is trained: sparse evolutionary training (SET, Mocanu et al., arXiv 1707.04780).

After every n-th update, in each layer:

    drop      the fraction f of the entries of S that are smallest in magnitude
    regrow    as many at random positions where S had none: value zero, and moments of the optimizer zero

Nothing moves in the last quarter of a run, so that what grew last is trained too (Evci et al., arXiv 1911.11134, stop
there). W changes by what is dropped. Optimizers count updates a tensor, not an entry: the first steps by Adam of
a fresh entry, whose second moment has to grow anew, are up to six times as large as those of others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sltrain.methods.base import Method, check_at_least, layers_of

if TYPE_CHECKING:
    from torch import Tensor

    from sltrain.engine.actions import Action, Moment, Running

LAST = 0.75  # share of the run after which positions stay


@dataclass
class Regrowth(Method):
    """The options of a method whose S moves."""

    regrow_every: int = 0  # updates after which entries of S move; 0: they stay where they were drawn
    regrow_fraction: float = 0.2  # share of the entries that move, those of the smallest values

    def check(self) -> None:
        super().check()
        check_at_least(0, regrow_every=self.regrow_every)
        if not 0 < self.regrow_fraction < 1:
            raise ValueError(
                f"method.regrow_fraction={self.regrow_fraction}: must be above 0 and below 1, a share of S's entries"
            )
        if self.regrow_every == 0 and self.regrow_fraction != 0.2:
            raise ValueError(
                f"method.regrow_fraction={self.regrow_fraction:g} has no effect while S stays; set method.regrow_every"
                " above 0, or drop it"
            )

    def against_ema(self) -> str | None:
        if self.regrow_every:
            return "moves entries of S: averages would mix those of several positions"
        return super().against_ema()

    def changes_vectors(self) -> bool:
        return self.regrow_every > 0 or super().changes_vectors()

    def agrees(self, step: int, before: int, after: int) -> bool:
        moves = {self._is_due(each, before) == self._is_due(each, after) for each in range(1, step + 1)}
        return moves <= {True} and super().agrees(step, before, after)

    def _is_due(self, step: int, max_steps: int) -> bool:
        return self.regrow_every > 0 and step % self.regrow_every == 0 and step <= LAST * max_steps

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action
        from sltrain.layers.kinds.sltrain import SLTrainLinear, rearrange

        layers = {f"{name}.values": layer for name, layer in layers_of(running.model, SLTrainLinear).items()}

        def is_due(step: int) -> bool:
            return self._is_due(step, running.max_steps)

        def regrow(moment: "Moment") -> None:
            sources = {name: layer.regrow(self.regrow_fraction, moment.generator) for name, layer in layers.items()}

            def follow(name: str, moments: "list[Tensor]") -> None:
                for each in moments:
                    rearrange(each, sources[name])

            running.change_moments(sources, follow)

        if self.regrow_every == 0:
            return super().actions(running)
        most = max((layer.support.num_nonzero for layer in layers.values()), default=0)
        every_source = 8 * sum(layer.support.num_nonzero for layer in layers.values())
        return [*super().actions(running), Action("regrow", is_due, regrow, temporary_bytes=every_source + 53 * most)]
