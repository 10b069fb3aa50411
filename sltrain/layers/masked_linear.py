"""What layers with a mask share: values and mask (masked.py), their start, and how a dense matrix is pruned into them.

The start is normal with standard deviation `init_std` (None: nn.Linear's, 1/sqrt(3 in)), drawn for the whole matrix, so
that a dense layer's start with the same generator has the same values at the kept places. `prune` chooses these:
"random"; "magnitude", the largest entries of the start or of the matrix that `set_weight` brings; "sparsegpt", by the
inputs that `fit` brings, where kept entries take over what pruned ones did (sparsegpt.py). Without inputs that is
"magnitude", as for inputs that are not correlated and of one size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.base import DRAWN_AT_ONCE, Footprint, ReplacedLinear, Rows, cast_bytes, fill_uniform, gradient_bytes
from sltrain.layers.masked import MaskedPart, gather, keep_largest, kept_per_row, pack, product_bytes
from sltrain.layers.parts import Part
from sltrain.layers.sparsegpt import prune as prune_by_inputs

CHOICES = ("random", "magnitude", "sparsegpt")


class MaskedLinear(ReplacedLinear):
    """The base of layers whose W keeps `keep` of every `of` neighbouring entries of a row. Parameters values
    (out, kept), bias (out,) or None; buffer mask (out, ceil(in / 8)) uint8. `like` are device and dtype. Raises
    ValueError unless 1 <= keep <= of <= in_features, and for an unknown `prune`."""

    GROUPS = {"values": "sparse", "mask": "mask"}

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        keep: int,
        of: int,
        bias: bool,
        init_std: float | None,
        prune: str,
        **like: Any,
    ) -> None:
        super().__init__(in_features, out_features)
        if prune not in CHOICES:
            raise ValueError(f"prune is {prune!r}; choose one of {', '.join(CHOICES)}")
        self.keep, self.of, self.prune = keep, of, prune
        self.init_std = 1 / math.sqrt(3 * in_features) if init_std is None else init_std
        self.values = nn.Parameter(torch.empty(out_features, kept_per_row(in_features, keep, of), **like))
        self.register_buffer("mask", self.values.new_empty(out_features, -(-in_features // 8), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the matrix, the mask and the bias."""
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.float32, device="cpu")
        for piece in weight.view(-1).split(DRAWN_AT_ONCE):
            piece.normal_(0, self.init_std, generator=generator)
        is_random = self.prune == "random"
        scores = torch.empty_like(weight).uniform_(generator=generator) if is_random else weight.abs()
        self._choose(scores)
        self._take(weight)
        if self.bias is not None:
            fill_uniform(self.bias, 1 / math.sqrt(self.in_features), generator)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """W at the kept places, which are chosen anew unless they are random."""
        if self.prune != "random":
            self._choose(weight.detach().float().abs())
        self._take(weight)

    @torch.no_grad()
    def fit(self, weight: Tensor, moment: Tensor) -> None:
        """With prune="sparsegpt" the mask and values by which products with such inputs change little. Raises
        ValueError for a moment that is not finite."""
        if self.prune != "sparsegpt":
            self.set_weight(weight)
            return
        fitted, mask = prune_by_inputs(weight.detach(), moment, self.keep, self.of)
        self.mask.copy_(pack(mask))
        self._take(fitted)

    def _choose(self, scores: Tensor) -> None:
        self.mask.copy_(pack(keep_largest(scores, self.keep, self.of)))

    def _take(self, weight: Tensor) -> None:
        """Give the values those of a matrix (out, in) at the kept places."""
        self.values.copy_(gather(weight.to(self.mask.device), self.mask, self.values.shape[1]))

    def parts(self) -> dict[str, Part]:
        return {"S": MaskedPart(self.values.detach(), self.mask, self.in_features)}

    def settings(self) -> dict[str, Any]:
        return {"keep": self.keep, "of": self.of}

    def multiply_adds(self) -> int:
        return self.values.numel()

    def footprint(self, rows: Rows) -> Footprint:
        """W, or dW, dense; never both."""
        dense = product_bytes(self.out_features, self.in_features, self.values.shape[1], rows.element_size)
        return Footprint(kept=0, temporary=dense + cast_bytes([self], rows), gradients=gradient_bytes(self))
