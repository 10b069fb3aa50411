"""W = W0 + (alpha / rank) B A with a frozen W0: what layers share whose factors move into W0 as training goes on."""

from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import DRAWN_AT_ONCE, Footprint, Rows, cast_bytes, fill_normal, gradient_bytes
from sltrain.layers.factors import FactoredLinear
from sltrain.layers.parts import DensePart, Part
from sltrain.numeric import stochastic_round

FROZEN_DTYPES = ("float32", "bfloat16")
ROUNDINGS = ("nearest", "stochastic")


class AdaptedLinear(FactoredLinear):
    """y = x W^T + bias with W = W0 + (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Parameters W0 (out, in), frozen, A (rank, in), B (out, rank), bias (out,) or None. W0 starts normal with standard
    deviation `init_std`; a subclass defines `start_factors`. `frozen_dtype` is that of W0, one of FROZEN_DTYPES (None:
    that of A and B): each product casts it to the dtype of x, and keeps no copy. `frozen_rounding` is how a bfloat16 W0
    takes up a change, to the nearest value or, `stochastic`, so that the mean is right. Raises ValueError for a rank
    outside [1, min(in, out)], an unknown dtype or rounding, and stochastic rounding of another dtype.
    """

    GROUPS = {"W0": "frozen"} | FactoredLinear.GROUPS

    def prepare(
        self,
        like: dict[str, Any],
        rank: int,
        alpha: float,
        *,
        frozen_dtype: str | None = None,
        frozen_rounding: str = "nearest",
    ) -> None:
        self.make_factors(like, rank, alpha)
        if frozen_dtype is not None and frozen_dtype not in FROZEN_DTYPES:
            raise ValueError(f"frozen_dtype is {frozen_dtype!r}; choose one of {', '.join(FROZEN_DTYPES)}")
        if frozen_rounding not in ROUNDINGS:
            raise ValueError(f"frozen_rounding is {frozen_rounding!r}; choose one of {', '.join(ROUNDINGS)}")
        dtype = self.A.dtype if frozen_dtype is None else getattr(torch, frozen_dtype)
        self.frozen_dtype, self.is_stochastic = frozen_dtype, frozen_rounding == "stochastic"
        if self.is_stochastic and dtype != torch.bfloat16:
            raise ValueError(
                f"frozen_rounding=stochastic is for a W0 in bfloat16, and it is {str(dtype).removeprefix('torch.')};"
                " set frozen_dtype=bfloat16, or frozen_rounding=nearest"
            )
        sides = self.out_features, self.in_features
        self.W0 = nn.Parameter(self.A.new_empty(sides, dtype=dtype), requires_grad=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        fill_normal(self.W0, self.init_std, generator)
        self.start_factors(generator)
        self.reset_bias(generator)

    def start_factors(self, generator: torch.Generator | None) -> None:
        """Fill A and B."""
        raise self._undefined("start_factors")

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        hidden = self.scale * aligned_linear(x, A)  # (..., rank)
        return aligned_linear(x, self.W0, self.bias, casts=True) + aligned_linear(hidden, B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as products use them."""
        return self.A, self.B

    @torch.no_grad()
    def absorb(self, B: Tensor, A: Tensor, scale: float, generator: torch.Generator | None = None) -> None:
        """W0 += scale B A for B (out, n), A (n, in). Where W0 has a dtype of its own, the sum is computed in float32
        and rounded once, to the nearest value or, with `frozen_rounding=stochastic` and a generator, at random."""
        draws = self.is_stochastic and generator is not None
        if self.W0.dtype == A.dtype and not draws:
            self.W0.addmm_(B, A, alpha=scale)
            return
        if draws:
            seed = int(torch.randint(2**62, (), generator=generator))
            generator = torch.Generator(self.W0.device).manual_seed(seed)
        exact, num_rows = torch.promote_types(A.dtype, torch.float32), self._rows_at_once()
        for rows, factor in zip(self.W0.split(num_rows), B.split(num_rows), strict=True):
            total = torch.addmm(rows.to(exact), factor.to(exact), A.to(exact), alpha=scale)
            rows.copy_(stochastic_round(total.float(), generator) if draws and generator is not None else total)

    @property
    def absorb_bytes(self) -> int:
        """What `absorb` allocates for a product of n = rank: some rows of W0 and A and B in float32, random bits."""
        if self.W0.dtype == self.A.dtype and not self.is_stochastic:
            return 0
        rows = min(self.out_features, self._rows_at_once()) * self.in_features
        return 4 * (rows * (5 if self.is_stochastic else 2) + self.A.numel() + self.B.numel())

    def _rows_at_once(self) -> int:
        return max(1, DRAWN_AT_ONCE // self.in_features)

    def parts(self) -> dict[str, Part]:
        return {"W0": DensePart(self.W0), **super().parts()}

    def dense_weight(self) -> Tensor:
        return super().dense_weight().to(self.A.dtype)

    def settings(self) -> dict[str, Any]:
        own = {} if self.frozen_dtype is None else {"frozen_dtype": self.frozen_dtype}
        return super().settings() | own

    def multiply_adds(self) -> int:
        return self.in_features * self.out_features + super().multiply_adds()

    def footprint(self, rows: Rows) -> Footprint:
        """h = x A^T is kept; temporary are both summands of y, or u = dy B and one summand of dx, and casts."""
        hidden = rows.num_rows * self.rank * rows.element_size
        summands = rows.num_rows * max(self.in_features, 2 * self.out_features) * rows.element_size
        is_cast = self.W0.element_size() != rows.element_size
        casts = 2 * cast_bytes([self], rows) + is_cast * self.W0.numel() * rows.element_size
        return Footprint(hidden, hidden + summands + casts, gradients=gradient_bytes(self))
