"""Layer kinds that the package does not contain, as another package would define them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.layers import DensePart, Footprint, LowRankPart, Part, ReplacedLinear, Rows
from sltrain.layers.base import fill_uniform, gradient_bytes


class ReLoRALinear(ReplacedLinear, kind="toy_relora"):
    """W = W0 + (alpha / rank) B A with a frozen W0, whose parameter has the name that a dense layer's has."""

    GROUPS = {"A": "low_rank", "B": "low_rank", "weight": "frozen"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **like), requires_grad=False)
        self.A = nn.Parameter(torch.empty(rank, in_features, **like))
        self.B = nn.Parameter(torch.empty(out_features, rank, **like))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None
        if not self.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for tensor in (self.weight, self.A, self.B, *([] if self.bias is None else [self.bias])):
            fill_uniform(tensor, 1 / math.sqrt(self.in_features), generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def parts(self) -> dict[str, Part]:
        return {"W0": DensePart(self.weight.detach()), "BA": LowRankPart(self.B.detach(), self.A.detach(), self.scale)}

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    def footprint(self, rows: Rows) -> Footprint:
        hidden = rows.num_rows * self.rank * rows.element_size
        output = rows.num_rows * self.out_features * rows.element_size  # y of B A beside that of W0
        return Footprint(kept=hidden, temporary=hidden + output, gradients=gradient_bytes(self))

    def multiply_adds(self) -> int:
        return self.in_features * self.out_features + self.rank * (self.in_features + self.out_features)


class SilentLinear(ReplacedLinear, kind="toy_silent"):
    """A layer that defines nothing of the interface."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight, self.bias = nn.Parameter(torch.zeros(out_features, in_features)), None


class TwoMatrices(ReLoRALinear, kind="toy_two_matrices"):
    """An activation between the factors: there is no single W."""

    is_mergeable = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.A)), self.B)

    def parts(self) -> dict[str, Part]:
        raise ValueError("there is no one W")


class Adapted(nn.Linear):
    """A linear with parameters beside its weight that it does not declare."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.A, self.B = nn.Parameter(torch.zeros(2, in_features)), nn.Parameter(torch.zeros(out_features, 2))


def instead_of_low_rank(kind: type) -> Callable[..., Any]:
    """Takes what method=low_rank gives a LowRankLinear, and makes a layer that has no start to choose."""
    return lambda *sizes, start, init_std, **like: kind(*sizes, **like)
