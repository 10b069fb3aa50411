"""Dense training: every projection stays an nn.Linear. The baseline the other methods are measured against.

So that it is a fair one, projections get the same treatment of awkward sides (5461 in LLaMA 1B) as factored ones do.
"""

from collections.abc import Callable

from torch import nn

from sltrain.layers.aligned import AlignedLinear
from sltrain.layers.convert import replace_linears
from sltrain.methods.settings import MethodSettings


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Put an AlignedLinear, with the same parameters, in place of each chosen linear; return their names.

    Rank, sparsity and their overrides belong to the model's recipe and are not used. Raises ValueError if no linear was
    chosen.
    """

    def make(name: str, linear: nn.Linear) -> nn.Module:
        aligned = AlignedLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        aligned.weight, aligned.bias = linear.weight, linear.bias
        return aligned

    return replace_linears(model, should_replace, make)
