"""optimizer=apollo_mini: apollo at rank 1 with one factor a matrix: next to no state (Zhu et al., arXiv 2412.05270,
section 4.2)."""

from dataclasses import dataclass

from sltrain.optim.kinds.apollo import Apollo
from sltrain.optim.kinds.base import OPTIMIZERS


@OPTIMIZERS.register("apollo_mini")
@dataclass
class ApolloMini(Apollo):
    """Options of optimizer=apollo_mini: those of apollo, with other defaults."""

    rank: int = 1
    scale: float = 128.0
    per: str = "tensor"
