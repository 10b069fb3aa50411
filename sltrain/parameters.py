"""What optimizers, methods and plans know of a parameter without holding it."""

from dataclasses import dataclass
from math import prod

# projection: a dense attention or MLP matrix; factor: A or B; values: the trained entries of a sparse matrix, singular
# values, norms of rows; embedding, head: a row for each id of the vocabulary; gain: of a norm, or a number
# that multiplies a whole output.
ROLES = ("projection", "factor", "values", "embedding", "head", "gain", "bias")
# Elements of a tensor worked on at once: what is computed in float32 takes some 16 MiB a tensor, however large it is.
PIECE = 2**22


@dataclass(frozen=True)
class ParamInfo:
    """One parameter: its name in the model, its shape, bytes an element, and what it is for (one of ROLES)."""

    name: str
    shape: tuple[int, ...]
    element_size: int
    role: str
    in_codes: bool = False  # its values are held as codes: an update decodes them

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it. Norm gains and biases are left out: pulling them to zero is no
        regularization. The values of S decay: they are entries of a weight matrix although their tensor is 1-D."""
        return self.role not in ("gain", "bias")


def is_gain_or_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias, or the weight of a module whose name contains "norm"."""
    *parents, leaf = name.split(".")
    return leaf == "bias" or (leaf == "weight" and bool(parents) and "norm" in parents[-1].lower())


def role_by_name(name: str) -> str:
    """The role of a parameter of which only the name is known: bias, gain or projection."""
    if is_gain_or_bias(name):
        return "bias" if name.rpartition(".")[2] == "bias" else "gain"
    return "projection"
