"""The base of optimizers that update every tensor by itself, by one rule. A file says what is kept and what the
learning rate multiplies; the torch optimizer (optim/rule.py), the bytes of the state and the rest follow.

    @OPTIMIZERS.register("lion")
    @dataclass
    class Lion(Rule):
        def new_state(self, weight): return {"momentum": torch.zeros_like(weight)}
        def direction(self, grad, state): ...
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sltrain.optim.rule import Factor

OTHERS = ("adamw", "adam8bit", "scale")


@dataclass
class Rule(OptimizerConfig):
    """A subclass defines `direction`, and `new_state` if it keeps anything."""

    def new_state(self, weight: "Tensor") -> dict[str, Any]:
        """Tensors and numbers kept for `weight` besides "step", on its device; also on the meta device."""
        return {}

    def direction(self, grad: "Tensor", state: dict[str, Any]) -> "Tensor":
        """What the learning rate times is subtracted, float32, of the shape of `grad`, which is float32 too. Updates
        the tensors of `state` in place; state["step"] counts the tensor's updates from 1."""
        raise TypeError(f"{type(self).__name__} does not define direction")

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        from sltrain.optim.rule import ByRule, named_after

        return named_after(self, ByRule)(groups, lr, self)

    def state_bytes(self, parameter: ParamInfo) -> int:
        import torch

        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[parameter.element_size]
        state = self.new_state(torch.empty(parameter.shape, dtype=dtype, device="meta"))
        return sum(prod(kept.shape) * kept.element_size() for kept in state.values() if isinstance(kept, torch.Tensor))


@dataclass
class MatrixRule(Rule):
    """A rule for the dense and factor matrices of the projections. Embeddings, head, norms and the values of S, which
    are no matrices or no maps from vectors to vectors, go to `others`."""

    others: str = "adamw"  # the optimizer of all other parameters: one of OTHERS

    def check(self) -> None:
        if self.others not in OTHERS:
            raise ValueError(f"optimizer.others={self.others}: choose one of {', '.join(OTHERS)}")

    def takes(self, parameter: ParamInfo) -> bool:
        return parameter.role in ("projection", "factor") and len(parameter.shape) == 2 and parameter.numel > 0

    def rest(self) -> OptimizerConfig:
        return OPTIMIZERS.load(self.others)(name=self.others)


@dataclass
class PairRule(MatrixRule):
    """A rule for the factors A (r, in) and B (out, r) of a layer together. It needs both gradients at once, so it does
    not go with updates inside backward or with stochastic rounding, which work on one tensor at a time."""

    whole_update: ClassVar[bool] = True

    def takes(self, parameter: ParamInfo) -> bool:
        return super().takes(parameter) and parameter.role == "factor" and parameter.name[-2:] in (".A", ".B")

    def directions(self, A: "Factor", B: "Factor") -> "tuple[Tensor, Tensor]":
        """What is subtracted of A and of B, each given as (weight, gradient, state), all float32."""
        raise TypeError(f"{type(self).__name__} does not define directions")

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        from sltrain.optim.rule import ByPair, named_after

        return named_after(self, ByPair)(groups, lr, self)


def check_share(**options: float) -> None:
    """Raise ValueError for an option that is not in [0, 1), such as the decay of an average."""
    for name, value in options.items():
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{name}={value}: must be from 0 to below 1")


def check_betas(betas: list[float]) -> None:
    """Raise ValueError for the decays of two averages that are not two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas={betas}: must be two numbers from 0 to below 1, such as [0.9,0.999]")


def check_finite(**options: float) -> None:
    """Raise ValueError for an option that is not a number above 0."""
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"optimizer.{name}={value}: must be a number above 0")
