"""SLoPe (Mozaffari et al., arXiv 2405.16325): 2:4 sparse W, pruned once more in backward; adapters at the end.

    y  = x S^T                       S has N of every M entries of a row; its mask is chosen once
    dx = dy S2                       S2 is S with N of every M entries of a column: S2^T has the pattern too, so both
                                     products can run on sparse matrix units; biased, where S2 drops what S has
    dS = (dy^T x) at the kept places
    y  = x S^T + (1 / r) x A^T B^T   over the last `adapter_share` of the updates, with B zero at first

The paper's matrix units are not used here: masks, gradients and states are its own, the products dense.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from sltrain.methods.base import METHODS, Method, check_above_zero, check_at_least, check_one_of, on_each
from sltrain.methods.sparse import BY_SIZE, read_pattern

if TYPE_CHECKING:
    from torch import nn

    from sltrain.engine.actions import Phase


@METHODS.register("slope")
@dataclass
class SLoPe(Method):
    """Options of method=slope."""

    rank: int = MISSING  # inner size of the adapters B A
    pattern: str = "2:4"  # N:M keeps N of every M neighbours of a row, and in backward of a column
    adapter_share: float = 0.01  # of all updates, the last ones, that train adapters; 0: none
    prune: str = "random"  # which: at random, or the largest in magnitude of the start (of init_from=, if it is set)
    gain: float = 1.0  # standard deviation of the start over model.initializer_range

    def check(self) -> None:
        check_at_least(1, rank=self.rank)
        check_above_zero(gain=self.gain)
        check_one_of(BY_SIZE, prune=self.prune)
        read_pattern(self.pattern)
        if not 0 <= self.adapter_share <= 1:
            raise ValueError(
                f"method.adapter_share={self.adapter_share}: must be between 0 and 1; it is a share of the updates"
            )

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.slope import SLoPeLinear

        keep, of = read_pattern(self.pattern)
        return SLoPeLinear(keep=keep, of=of, rank=self.rank, prune=self.prune, **like)

    def phases(self, max_steps: int) -> "list[Phase]":
        """The last updates, at least one, train adapters."""
        from sltrain.engine.actions import Phase
        from sltrain.layers.kinds.slope import SLoPeLinear

        if self.adapter_share == 0:
            return []
        add, start = (on_each(SLoPeLinear, do) for do in (SLoPeLinear.add_adapters, SLoPeLinear.start_adapters))
        return [Phase("adapters", max_steps - max(1, round(self.adapter_share * max_steps)), add, start)]
