"""W = W0 + (alpha / rank) B A with a frozen W0: what layers share whose factors move into W0 as training goes on."""

import math

import torch
from torch import Tensor, nn

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import DRAWN_AT_ONCE, Footprint, Rows, cast_bytes, fill_uniform, gradient_bytes
from sltrain.layers.factors import FactoredLinear, StartedLinear
from sltrain.layers.parts import DensePart, Part


class AdaptedLinear(StartedLinear):
    """y = x W^T + bias with W = W0 + (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Parameters W0 (out, in), frozen, A (rank, in), B (out, rank), bias (out,) or None. W0 starts normal with standard
    deviation `init_std`; a subclass defines `start_factors`. Raises ValueError for a rank outside [1, min(in, out)].
    """

    GROUPS = {"W0": "frozen"} | FactoredLinear.GROUPS

    def prepare(self) -> None:
        self.W0 = nn.Parameter(self.A.new_empty(self.out_features, self.in_features), requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for piece in self.W0.view(-1).split(DRAWN_AT_ONCE):
            piece.copy_(torch.empty(len(piece), device="cpu").normal_(0, self.init_std, generator=generator))
        self.start_factors(generator)
        if self.bias is not None:
            fill_uniform(self.bias, 1 / math.sqrt(self.in_features), generator)

    def start_factors(self, generator: torch.Generator | None) -> None:
        """Fill A and B."""
        raise self._undefined("start_factors")

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        hidden = self.scale * aligned_linear(x, A)  # (..., rank)
        return aligned_linear(x, self.W0, self.bias) + aligned_linear(hidden, B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as products use them."""
        return self.A, self.B

    def parts(self) -> dict[str, Part]:
        return {"W0": DensePart(self.W0), **super().parts()}

    def multiply_adds(self) -> int:
        return self.in_features * self.out_features + super().multiply_adds()

    def footprint(self, rows: Rows) -> Footprint:
        """h = x A^T is kept; temporary are both summands of y, or u = dy B and one summand of dx, and casts."""
        hidden = rows.num_rows * self.rank * rows.element_size
        summands = rows.num_rows * max(self.in_features, 2 * self.out_features) * rows.element_size
        is_cast = self.W0.element_size() > rows.element_size
        casts = 2 * cast_bytes([self], rows) + is_cast * self.W0.numel() * rows.element_size
        return Footprint(hidden, hidden + summands + casts, gradients=gradient_bytes(self))
