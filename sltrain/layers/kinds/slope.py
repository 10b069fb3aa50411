"""W = S + (1 / rank) B A: S keeps n of every m entries of a row, fewer still in backward; B A joins late (SLoPe)."""

from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, fill_normal
from sltrain.layers.masked import compose, gather, keep_largest, masked_linear, pack
from sltrain.layers.masked_linear import MaskedLinear
from sltrain.layers.parts import LowRankPart, Part


class SLoPeLinear(MaskedLinear, kind="slope"):
    """y = x W^T + bias; x (..., in_features) -> (..., out_features). S as MaskedLinear's W, with its arguments.

    In backward dx = dy S2, where S2 keeps of every `of` entries in a column of S the `keep` largest of its start; other
    gradients are exact. The buffer again (out, ceil(kept / 8)) uint8 holds a bit a kept entry of S: whether S2 has it.
    A (rank, in), B (out, rank) exist with `has_adapters`, or once `add_adapters` is called. Raises ValueError as
    MaskedLinear, for a column shorter than `of`, and for a rank outside [1, min(in, out)].
    """

    GROUPS = MaskedLinear.GROUPS | {"again": "mask", "A": "low_rank", "B": "low_rank"}

    again: Tensor

    def prepare(
        self, like: dict[str, Any], keep: int, of: int, rank: int, has_adapters: bool = False, prune: str = "random"
    ) -> None:
        self.make_values(like, keep, of, prune)
        if of > self.out_features:
            raise ValueError(f"cannot keep {keep} of every {of} entries of a column of {self.out_features}")
        self.check_rank(rank)
        self.rank, self.scale, self.has_adapters = rank, 1 / rank, False
        bits = self.values.new_empty(self.out_features, -(-self.values.shape[1] // 8), dtype=torch.uint8)
        self.register_buffer("again", bits)
        if has_adapters:
            self.add_adapters()

    def add_adapters(self) -> None:
        """Make A and B, without values."""
        self.A = nn.Parameter(self.values.new_empty(self.rank, self.in_features))
        self.B = nn.Parameter(self.values.new_empty(self.out_features, self.rank))
        self.has_adapters = True

    @torch.no_grad()
    def start_adapters(self, generator: torch.Generator | None) -> None:
        """A standard normal, B zero, as the authors start them: the function stays."""
        fill_normal(self.A, 1, generator)
        self.B.zero_()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.has_adapters:
            self.start_adapters(generator)

    def _take(self, weight: Tensor) -> None:
        super()._take(weight)
        columns = compose(self.values, self.mask, self.in_features).abs().float().t().contiguous()
        chosen = keep_largest(columns, self.keep, self.of).t().contiguous()
        self.again.copy_(pack(gather(chosen, self.mask, self.values.shape[1])))

    def forward(self, x: Tensor) -> Tensor:
        y = masked_linear(x, self.values, self.mask, self.bias, self.again)
        if not self.has_adapters:
            return y
        hidden = self.scale * aligned_linear(x, self.A)
        return y + aligned_linear(hidden, self.B)

    def parts(self) -> dict[str, Part]:
        if not self.has_adapters:
            return super().parts()
        return super().parts() | {"BA": LowRankPart(self.B.detach(), self.A.detach(), self.scale)}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"rank": self.rank, "has_adapters": self.has_adapters}

    def multiply_adds(self) -> int:
        """Of S2, where dx is taken by it, as many as of S."""
        adapters = self.rank * (self.in_features + self.out_features) if self.has_adapters else 0
        return super().multiply_adds() + adapters

    def footprint(self, rows: Rows) -> Footprint:
        """S, or dS, dense. With adapters the scaled x A^T is kept, and its gradient and a second dx are there."""
        own, size = super().footprint(rows), rows.num_rows * rows.element_size * self.has_adapters
        return Footprint(size * self.rank, own.temporary + size * (self.rank + self.in_features), own.gradients)
