"""CR-Net: the first decoder layer is dense; each projection of the others is a low-rank product, plus a learned number
times the output of the same projection one decoder layer before (arXiv 2509.18993)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Ranked, check_above_zero, pattern_fits, replace_each

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("cr_net")
@dataclass
class CRNet(Ranked):
    """Options of method=cr_net."""

    beta: float = 1.0  # what each layer's number starts as
    gain: float = 1.0  # of the start of W and of B A: that dense start's standard deviation over initializer_range

    def check(self) -> None:
        super().check()
        check_above_zero(gain=self.gain)
        if not math.isfinite(self.beta):
            raise ValueError(f"method.beta={self.beta}: must be a number, such as 1")

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.cr_net import CRNetLinear

        return CRNetLinear(rank=self.rank_of(name), start_beta=self.beta, **like)

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        from torch import nn

        from sltrain.layers.aligned import AlignedLinear

        def first(name: str, linear: "nn.Linear") -> bool:
            return chosen(name, linear) and pattern_fits("*layers.0.*", name)

        def later(name: str, linear: "nn.Linear") -> bool:
            return chosen(name, linear) and not pattern_fits("*layers.0.*", name)

        if not any(isinstance(module, nn.Linear) and later(name, module) for name, module in model.named_modules()):
            raise ValueError(
                "method=cr_net builds on the decoder layer before; set model.num_hidden_layers to 2 or more"
            )
        dense = replace_each(model, first, lambda name, linear, like: AlignedLinear.of(linear, self.gain))
        return dense + super().replace(model, later)
