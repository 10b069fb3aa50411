"""A sparse W: the mask is chosen before the first update and stays, the kept entries are trained.

`method.sparsity` zeroes a share of each row, `method.pattern=2:4` keeps 2 of every 4 neighbours, which sparse matrix
units multiply. The mask is random, or with `method.prune=magnitude` keeps the largest entries of what the run starts
from: `init_from=` a dense run is one-shot pruning, and training goes on (Zhu and Gupta, arXiv 1710.01878, compare such
models with dense ones of their size). `method.prune=sparsegpt` prunes by the inputs that layers see, in the first rows
of the training text (layers/sparsegpt.py). Stored are kept values and a bit an entry, see layers/masked.py.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.methods.base import METHODS, Method, check_above_zero, check_at_least, check_one_of

if TYPE_CHECKING:
    from torch import nn

BY_SIZE = ("random", "magnitude")
CHOICES = (*BY_SIZE, "sparsegpt")  # as in layers/masked_linear.py, which cannot be read from here: it imports torch
DEFAULT = 0.5
DEFAULT_ROWS = 128  # as in the paper, of 2,048 tokens there


@METHODS.register("sparse")
@dataclass
class Sparse(Method):
    """Options of method=sparse."""

    sparsity: float | None = None  # share of each row that is zero; None: 0.5, unless there is a pattern
    pattern: str | None = None  # N:M keeps N of every M neighbours of a row
    prune: str = "random"  # which: at random, or by magnitude of the start (of init_from=, if it is set), or sparsegpt
    calibration_rows: int | None = None  # prune=sparsegpt: rows of training text whose inputs decide; None: 128
    gain: float = 1.0  # standard deviation of the start over model.initializer_range

    def check(self) -> None:
        check_above_zero(gain=self.gain)
        check_one_of(CHOICES, prune=self.prune)
        check_at_least(1, calibration_rows=self.calibration_rows)
        if self.calibration_rows is not None and self.prune != "sparsegpt":
            raise ValueError(
                f"method.calibration_rows={self.calibration_rows} is for method.prune=sparsegpt, and prune is"
                f" {self.prune}; drop one of the two"
            )
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(f"method.sparsity={self.sparsity} and method.pattern={self.pattern}: drop one of the two")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(
                f"method.sparsity={self.sparsity}: must be at least 0 and below 1; it is the share of zeros"
            )
        if self.pattern is not None:
            read_pattern(self.pattern)

    def layer(self, name: str, linear: "nn.Linear", like: dict[str, Any]) -> "nn.Module":
        from sltrain.layers.kinds.sparse import SparseLinear

        keep, of = self.pair(linear.in_features)
        return SparseLinear(keep=keep, of=of, prune=self.prune, **like)

    def num_calibration_rows(self) -> int:
        if self.prune != "sparsegpt":
            return 0
        return DEFAULT_ROWS if self.calibration_rows is None else self.calibration_rows

    def against_random_start(self) -> str | None:
        if self.prune != "sparsegpt":
            return None
        return "method.prune=sparsegpt prunes trained weights: add init_from=RUN, or choose random or magnitude"

    def pair(self, in_features: int) -> tuple[int, int]:
        """How many entries are kept, of how many neighbours. A row keeps at least one."""
        if self.pattern is not None:
            return read_pattern(self.pattern)
        share = 1 - (DEFAULT if self.sparsity is None else self.sparsity)
        return max(1, round(share * in_features)), in_features

    def columns(self) -> dict[str, Any]:
        default = {} if self.pattern else {"sparsity": DEFAULT}
        rows = {"calibration_rows": self.num_calibration_rows()} if self.prune == "sparsegpt" else {}
        return default | super().columns() | rows


def read_pattern(text: str) -> tuple[int, int]:
    """The numbers of "N:M". Raises ValueError for other text, and unless 1 <= N <= M."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    n, m = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= n <= m:
        raise ValueError(f"method.pattern={text}: write N:M with 1 <= N <= M, such as 2:4")
    return n, m
