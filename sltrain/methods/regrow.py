"""An S whose positions move while it is trained: sparse evolutionary training (SET, Mocanu et al., arXiv 1707.04780),
and RigL (Evci et al., arXiv 1911.11134).

After every n-th update, in each layer:

    drop      the fraction f of the entries of S that are smallest in magnitude
    regrow    as many where S had none, at random (SET) or where the gradient of W is largest (RigL): value zero, and
              moments of the optimizer zero

That gradient is dense, and no update has it: one more pass computes it, a layer at a time, of the last micro-batch of
each rank, summed over ranks. What was dropped may grow again by it, as in RigL, and not at random. RigL moves entries
instead of an update, and lowers f along a cosine; here they move after one, and f stays. A gradient that is zero or not
finite chooses nothing: then they grow at random.

Nothing moves in the last quarter of a run, so that what grew last is trained too, as in RigL. W changes by
what is dropped. Optimizers count updates a tensor, not an entry: the first steps by Adam of
a fresh entry, whose second moment has to grow anew, are up to six times as large as those of others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sltrain.methods.base import Method, check_at_least, check_one_of, layers_of

if TYPE_CHECKING:
    from torch import Tensor

    from sltrain.engine.actions import Action, Moment, Running
    from sltrain.layers import SLTrainLinear

    Layers = Mapping[str, SLTrainLinear]
    Positions = dict[str, Tensor]  # where each layer's S grows

LAST = 0.75  # share of the run after which positions stay


@dataclass
class Regrowth(Method):
    """The options of a method whose S moves."""

    regrow_every: int = 0  # updates after which entries of S move; 0: they stay where they were drawn
    regrow_by: str = "random"  # where entries grow: at random, or where the gradient is largest
    regrow_fraction: float = 0.2  # share of the entries that move, those of the smallest values

    def check(self) -> None:
        super().check()
        check_at_least(0, regrow_every=self.regrow_every)
        if not 0 < self.regrow_fraction < 1:
            raise ValueError(
                f"method.regrow_fraction={self.regrow_fraction}: must be above 0 and below 1, a share of S's entries"
            )
        check_one_of(("random", "gradient"), regrow_by=self.regrow_by)
        for name, value, usual in (("fraction", self.regrow_fraction, 0.2), ("by", self.regrow_by, "random")):
            if self.regrow_every == 0 and value != usual:
                raise ValueError(
                    f"method.regrow_{name}={value} has no effect while S stays; set method.regrow_every above 0, or"
                    " drop it"
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

        layers = {name: layer for name, layer in layers_of(running.model, SLTrainLinear).items() if len(layer.values)}
        if self.regrow_every == 0 or not layers:
            return super().actions(running)
        by_gradient = self.regrow_by == "gradient"

        def is_due(step: int) -> bool:
            return self._is_due(step, running.max_steps)

        def regrow(moment: "Moment") -> None:
            grow = self._by_gradient if by_gradient else self._at_random
            fresh = grow(layers, running, moment)
            sources = {f"{name}.values": layer.move(fresh[name]) for name, layer in layers.items()}

            def follow(name: str, moments: "list[Tensor]") -> None:
                for each in moments:
                    rearrange(each, sources[name])

            running.change_moments(sources, follow)

        most = max(layer.support.num_nonzero for layer in layers.values())
        every_source = 8 * sum(layer.support.num_nonzero for layer in layers.values())
        largest = max(layer.support.num_entries for layer in layers.values())
        dense = 16 * largest * by_gradient  # W, its gradient, and the sizes that are sorted
        temporary = every_source + max(dense, 53 * most)
        return [*super().actions(running), Action("regrow", is_due, regrow, temporary, passes=by_gradient)]

    def _at_random(self, layers: "Layers", running: "Running", moment: "Moment") -> "Positions":
        return {
            name: layer.free_at_random(layer.num_moving(self.regrow_fraction), moment.generator)
            for name, layer in layers.items()
        }

    def _by_gradient(self, layers: "Layers", running: "Running", moment: "Moment") -> "Positions":
        from sltrain.layers.dense_gradient import dense_gradients

        fresh: Positions = {}

        def take(name: str, gradient: "Tensor") -> None:
            total, count = running.sum_ranks(gradient.float()), layers[name].num_moving(self.regrow_fraction)
            if bool(total.isfinite().all()) and bool(total.any()):
                fresh[name] = layers[name].free_where_largest(count, total)
            else:
                fresh[name] = layers[name].free_at_random(count, moment.generator)

        dense_gradients(layers, lambda: running.model(*moment.inputs()[-1]), take)
        return fresh
