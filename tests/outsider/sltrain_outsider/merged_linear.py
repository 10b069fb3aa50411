"""W = W0 + (alpha / rank) B A, where W0 is trained first, then frozen beside B and A, which are merged into it now and
then."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.layers import DensePart, Footprint, LowRankPart, Part, ReplacedLinear, Rows


class MergedLinear(ReplacedLinear, kind="merged"):
    """x (..., in) -> (..., out). Without factors W is W0."""

    GROUPS = {"W0": "dense", "A": "low_rank", "B": "low_rank"}
    CODE = "merged_code.py"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        has_factors: bool = False,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank, self.alpha, self.has_factors = rank, alpha, False
        self.W0 = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if has_factors:
            self.add_factors()
        if not self.W0.is_meta:
            self.reset_parameters()

    def add_factors(self) -> None:
        """Freeze W0 and make B and A, without values."""
        self.W0.requires_grad_(False)
        self.A = nn.Parameter(self.W0.new_empty(self.rank, self.in_features))
        self.B = nn.Parameter(self.W0.new_empty(self.out_features, self.rank))
        self.has_factors = True

    @torch.no_grad()
    def start_factors(self, generator: torch.Generator | None) -> None:
        """A random, B zero: the function stays."""
        self.A.copy_(torch.empty(self.A.shape).normal_(0, self.in_features**-0.5, generator=generator))
        self.B.zero_()

    @torch.no_grad()
    def merge(self, generator: torch.Generator) -> None:
        """Add B A to W0 and start the factors again."""
        self.W0 += self.alpha / self.rank * (self.B @ self.A)
        self.start_factors(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.W0.copy_(torch.empty(self.W0.shape).normal_(0, 0.02, generator=generator))
        if self.bias is not None:
            self.bias.zero_()
        if self.has_factors:
            self.start_factors(generator)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.W0, self.bias)
        return y + self.alpha / self.rank * F.linear(F.linear(x, self.A), self.B) if self.has_factors else y

    def parts(self) -> dict[str, Part]:
        own: dict[str, Part] = {"W0": DensePart(self.W0)}
        return own | ({"BA": LowRankPart(self.B, self.A, self.alpha / self.rank)} if self.has_factors else {})

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "has_factors": self.has_factors}

    def footprint(self, rows: Rows) -> Footprint:
        gradients = sum(p.numel() for p in self.parameters() if p.requires_grad) * rows.element_size
        hidden = rows.num_rows * self.rank * rows.element_size if self.has_factors else 0
        wide = rows.num_rows * self.out_features * rows.element_size if self.has_factors else 0
        return Footprint(kept=hidden, temporary=hidden + 2 * wide, gradients=gradients)

    def multiply_adds(self) -> int:
        factors = self.rank * (self.in_features + self.out_features) if self.has_factors else 0
        return self.in_features * self.out_features + factors
