"""W = W0 + (alpha / rank) B A: a frozen matrix, and trained factors that are merged into it now and then (ReLoRA,
arXiv 2307.05695). A layer of a warm start is dense until it is given its factors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.aligned import AlignedLinear, aligned_linear
from sltrain.layers.base import DRAWN_AT_ONCE, Footprint, Rows, cast_bytes, fill_uniform, gradient_bytes
from sltrain.layers.factors import FactoredLinear
from sltrain.layers.parts import DensePart, Part


class ReLoRALinear(FactoredLinear, kind="relora"):
    """y = x W^T + bias with W = W0 + (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Parameters W0 (out, in), frozen, A (rank, in), B (out, rank), bias (out,) or None. A starts uniform in +-1/sqrt(in)
    and B zero, after each merge too: with both zero, neither would get a gradient. W0 starts normal with standard
    deviation `init_std`, by default that of nn.Linear, 1/sqrt(3 in). Construction and meta as in SLTrainLinear; raises
    ValueError for a rank outside [1, min(in, out)].
    """

    GROUPS = {"W0": "frozen"} | FactoredLinear.GROUPS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, bias, device=device, dtype=dtype)
        if rank == 0:
            raise ValueError(f"a {self.kind} layer needs a rank of at least 1, got 0")
        self.init_std = 1 / math.sqrt(3 * in_features) if init_std is None else init_std
        W0 = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.W0 = nn.Parameter(W0, requires_grad=False)
        if not self.W0.is_meta:
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for piece in self.W0.view(-1).split(DRAWN_AT_ONCE):
            piece.copy_(torch.empty(len(piece), device="cpu").normal_(0, self.init_std, generator=generator))
        self.start_factors(generator)
        if self.bias is not None:
            fill_uniform(self.bias, 1 / math.sqrt(self.in_features), generator)

    @torch.no_grad()
    def start_factors(self, generator: torch.Generator | None) -> None:
        """Draw A and make B zero: W is then W0."""
        fill_uniform(self.A, 1 / math.sqrt(self.in_features), generator)
        self.B.zero_()

    @torch.no_grad()
    def merge(self, generator: torch.Generator | None) -> None:
        """Add (alpha / rank) B A to W0 and start the factors again. W stays, up to the rounding of W0."""
        self.W0.addmm_(self.B, self.A, alpha=self.scale)
        self.start_factors(generator)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """W0 is the matrix, and B zero."""
        self.W0.copy_(weight)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.scale * aligned_linear(x, self.A)  # (..., rank)
        return aligned_linear(x, self.W0, self.bias) + aligned_linear(hidden, self.B)

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


class WarmLinear(AlignedLinear):
    """The dense layer of a warm start, which knows the factors that it will be given. Takes over the tensors of
    `linear`; raises ValueError for a rank that its shape cannot have."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha = rank, alpha
        self._adapted(0.0)

    def adapted(self, init_std: float) -> ReLoRALinear:
        """The layer whose W0 is this one's weight, not a copy; its factors have memory and no values."""
        layer, device = self._adapted(init_std), self.weight.device
        layer.W0, layer.bias = nn.Parameter(self.weight.detach(), requires_grad=False), self.bias
        layer.A, layer.B = (nn.Parameter(torch.empty_like(each, device=device)) for each in (layer.A, layer.B))
        return layer

    def _adapted(self, init_std: float) -> ReLoRALinear:
        like: dict[str, Any] = {"bias": self.bias is not None, "device": "meta", "dtype": self.weight.dtype}
        return ReLoRALinear(self.in_features, self.out_features, self.rank, self.alpha, **like, init_std=init_std)
