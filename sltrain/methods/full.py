"""Dense training: every projection stays an nn.Linear. The baseline the other methods are measured against.

So that it is a fair one, projections get the same treatment of awkward sides (5461 in LLaMA 1B) as factored ones do.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Method, replace_each

if TYPE_CHECKING:
    from torch import nn

    from sltrain.methods.base import Chosen


@METHODS.register("full")
@dataclass
class Full(Method):
    """method=full has no options."""

    def replace(self, model: "nn.Module", chosen: "Chosen") -> list[str]:
        """Put an AlignedLinear, with the same parameters, in place of each chosen linear."""
        from sltrain.layers.aligned import AlignedLinear

        def make(name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
            aligned = AlignedLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            aligned.weight, aligned.bias = linear.weight, linear.bias
            return aligned

        return replace_each(model, chosen, make)
