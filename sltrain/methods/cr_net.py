"""CR-Net: the first decoder layer is dense; each projection of the others is a low-rank product, plus a learned number
times the output of the same projection one decoder layer before (arXiv 2509.18993)."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Method, check_above_zero, check_ranks, pattern_fits, replace_each, resolve

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("cr_net")
@dataclass
class CRNet(Method):
    """Options of method=cr_net."""

    rank: int = MISSING  # inner size of B A
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    beta: float = 1.0  # what each layer's number starts as
    gain: float = 1.0  # of the start of W and of B A: that dense start's standard deviation over initializer_range

    def check(self) -> None:
        check_ranks("cr_net", self.rank, self.rank_overrides)
        check_above_zero(gain=self.gain)
        if not math.isfinite(self.beta):
            raise ValueError(f"method.beta={self.beta}: must be a number, such as 1")

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from torch import nn

        from sltrain.layers.aligned import AlignedLinear
        from sltrain.layers.kinds.cr_net import CRNetLinear

        std = self.gain * getattr(getattr(model, "config", None), "initializer_range", 0.02)

        def first(name: str, linear: "nn.Linear") -> bool:
            return chosen(name, linear) and pattern_fits("*layers.0.*", name)

        def later(name: str, linear: "nn.Linear") -> bool:
            return chosen(name, linear) and not pattern_fits("*layers.0.*", name)

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            rank = resolve(self.rank, self.rank_overrides, name)
            sides = linear.in_features, linear.out_features
            return CRNetLinear(*sides, rank, **like, init_std=std, start_beta=self.beta)

        if not any(isinstance(module, nn.Linear) and later(name, module) for name, module in model.named_modules()):
            raise ValueError(
                "method=cr_net builds on the decoder layer before; set model.num_hidden_layers to 2 or more"
            )
        dense = replace_each(model, first, lambda name, linear, like: AlignedLinear.of(linear, self.gain))
        return dense + replace_each(model, later, make, {"rank_overrides": self.rank_overrides})
