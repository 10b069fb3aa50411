"""LORO: W = B A, whose factors take Adam's steps, and now and then an exact step along the manifold of matrices of
their rank (Mo, Huang, Pan, "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization", ICLR
2025).

    most updates         B and A take the optimizer's step, at rank / lr_width of the learning rate (equation 12)
    every `exact_every`  B A takes the Riemannian step of equation 10 at the whole rate, with the optimizer's step in
                         place of the gradients, as in the authors' code; moments begin again, and the learning rate
                         climbs over `restart_warmup` updates

How an action learns the optimizer's step, of any optimizer: it keeps the factors before it, and takes the difference.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Ranked, check_at_least, check_one_of, layers_of
from sltrain.methods.restarts import check_climb, jagged

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sltrain.engine.actions import Action, Moment, Running
    from sltrain.parameters import ParamInfo

LOWEST = 1e-6  # of the schedule's learning rate, in the first update after an exact step


@METHODS.register("loro")
@dataclass
class LORO(Ranked):
    """Options of method=loro."""

    exact_every: int = 500  # updates from exact step to exact step; 0: none
    lr_width: int = MISSING  # between them the factors learn at rank / lr_width of the rate; 0: at the whole rate
    refresh: str = "all"  # whose moments begin again after an exact step: all, factors or none
    restart_warmup: int = 5  # updates after an exact step in which the learning rate climbs; 0: none
    start: str = "xavier"  # xavier: each factor as a layer; spectral: nearest to a dense start (layers/factors.py)

    def check(self) -> None:
        super().check()
        check_at_least(0, exact_every=self.exact_every, lr_width=self.lr_width, restart_warmup=self.restart_warmup)
        check_one_of(("all", "factors", "none"), refresh=self.refresh)
        check_one_of(("xavier", "spectral"), start=self.start)
        check_climb(self.restart_warmup, exact_every=self.exact_every)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers import LowRankLinear

        rank = self.rank_of(name)
        return LowRankLinear(rank=rank, alpha=rank, start=self.start, **like)

    def group_options(self, parameter: "ParamInfo") -> dict[str, float]:
        is_factor = parameter.role == "factor" and self.lr_width > 0
        return {"lr_scale": self._lr_scale(min(parameter.shape))} if is_factor else {}

    def _lr_scale(self, rank: int) -> float:
        return rank / self.lr_width if self.lr_width else 1.0

    def lr_factor(self, step: int, max_steps: int) -> float:
        return jagged(step, self.exact_every, self.restart_warmup + 1, LOWEST)

    def exchanges_factors(self) -> bool:
        return self.exact_every > 0

    def acts_before_step(self) -> bool:
        return self.exact_every > 0

    def actions(self, running: "Running") -> "list[Action]":
        from sltrain.engine.actions import Action, every
        from sltrain.layers import LowRankLinear
        from sltrain.layers.riemannian import riemannian_step, step_bytes

        layers = layers_of(running.model, LowRankLinear)
        kept: dict[str, tuple[Tensor, Tensor]] = {}  # the factors, while the optimizer makes its step

        def before() -> None:
            for name, layer in layers.items():
                kept[name] = layer.B.clone(), layer.A.clone()

        def exact(moment: "Moment") -> None:
            if not kept:  # the update was skipped
                return
            for name, layer in layers.items():
                B, A = kept.pop(name)
                lr_scale = self._lr_scale(layer.rank)
                new_B, new_A = riemannian_step(B, A, (B - layer.B) / lr_scale, (A - layer.A) / lr_scale)
                if new_B.isfinite().all() and new_A.isfinite().all():  # without full rank the plain step stays
                    layer.B.copy_(new_B)
                    layer.A.copy_(new_A)
            everything = [name for name, p in running.model.named_parameters() if p.requires_grad]
            factors = [f"{name}.{leaf}" for name in layers for leaf in "AB"]
            running.reset_state({"all": everything, "factors": factors, "none": []}[self.refresh])

        if self.exact_every == 0:
            return []
        held = sum(p.numel() * p.element_size() for layer in layers.values() for p in (layer.A, layer.B))
        sizes = [(each.out_features, each.in_features, each.rank, each.A.element_size()) for each in layers.values()]
        temporary = held + max((step_bytes(*each) for each in sizes), default=0)
        due = every(self.exact_every)
        return [Action("exact_step", due, exact, temporary, before=before, before_bytes=held, decomposes=True)]
