"""What optimizers, methods and plans know of a parameter without holding it."""

from dataclasses import dataclass
from math import prod

# head, embedding: the rows of ids; projection: a dense attention or MLP matrix; factor: A or B; values: the trained
# entries of a sparse matrix; gain: of a norm; bias.
ROLES = ("projection", "factor", "values", "embedding", "head", "gain", "bias")


@dataclass(frozen=True)
class ParamInfo:
    """One parameter: its name in the model, its shape, bytes an element, and what it is for (one of ROLES)."""

    name: str
    shape: tuple[int, ...]
    element_size: int
    role: str

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)
