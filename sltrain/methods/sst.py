"""Sparse Spectral Training: W = U diag(s) V of full rank, of which all s and now these, now those singular vectors are
trained (Zhao et al., arXiv 2405.15481, ICML 2025; algorithm 1).

    every update               trained vectors get length one, negative singular values become 0
    every `select_every`       an iteration ends: `rank` other vectors are drawn, the moments of U and V begin again
    every `iterations` of them a round ends: U, s and V become a singular value decomposition of W again, and the
                               moments of s begin again, too

Gradients and the weights of the draw are those of layers/kinds/sst.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Ranked, check_above_zero, check_at_least, layers_of, on_each
from sltrain.methods.restarts import check_climb, jagged

if TYPE_CHECKING:
    from torch import nn

    from sltrain.engine.actions import Action, Moment, Running


@METHODS.register("sst")
@dataclass
class SST(Ranked):
    """Options of method=sst. `rank` singular vectors of either side are trained at a time."""

    select_every: int = 200  # updates of an iteration, T3 in the paper; 0: the first vectors for ever
    iterations: int | None = None  # of a round, T2; None: min(in, out) / rank, rounded up
    restart_warmup: int = 20  # updates of an iteration, but the first, in which the learning rate climbs; 0: none
    gain: float = 1.0  # the start's standard deviation over model.initializer_range

    def check(self) -> None:
        super().check()
        check_at_least(0, select_every=self.select_every, restart_warmup=self.restart_warmup)
        check_at_least(1, iterations=self.iterations)
        check_above_zero(gain=self.gain)
        check_climb(self.restart_warmup, select_every=self.select_every)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.sst import SpectralLinear

        return SpectralLinear(rank=self.rank_of(name), **like)

    def lr_factor(self, step: int, max_steps: int) -> float:
        return jagged(step, self.select_every, self.restart_warmup, 1 / max(self.restart_warmup, 1))

    def exchanges_factors(self) -> bool:
        return self.select_every > 0

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action, every
        from sltrain.layers.kinds.sst import SpectralLinear

        layers = layers_of(running.model, SpectralLinear)

        def select(moment: "Moment") -> None:
            fresh = []
            for name, layer in layers.items():
                iterations = self.iterations or -(-layer.full_rank // layer.rank)
                ends_round = moment.step // self.select_every % iterations == 0
                if ends_round:
                    layer.decompose()
                layer.select(moment.generator)
                fresh += [f"{name}.{leaf}" for leaf in (("U", "V", "s") if ends_round else ("U", "V"))]
            running.reset_state(fresh)

        temporary = max((layer.select_bytes for layer in layers.values()), default=0)
        chosen = Action("select", every(self.select_every), select, temporary, decomposes=True)
        tidy = on_each(SpectralLinear, SpectralLinear.tidy)
        return [Action("tidy", every(1), lambda moment: tidy(running.model)), chosen]
