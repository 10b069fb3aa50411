"""What layers with a mask share: values and mask (masked.py), their start, and how a dense matrix is pruned into them.

The start is normal with standard deviation `init_std` (None: nn.Linear's, 1/sqrt(3 in)), drawn for the whole matrix, so
that a dense layer's start with the same generator has the same values at the kept places. `prune` chooses these:
"random"; "magnitude", the largest entries of the start or of the matrix that `set_weight` brings; "sparsegpt", by the
inputs that `fit` brings, where kept entries take over what pruned ones did (sparsegpt.py). Without inputs that is
"magnitude", as for inputs that are not correlated and of one size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.masked import MaskedPart, gather, keep_largest, kept_per_row, pack, product_bytes
from sltrain.layers.parts import Part
from sltrain.layers.sparsegpt import prune as prune_by_inputs
from sltrain.layers.started import StartedLinear

CHOICES = ("random", "magnitude", "sparsegpt")


class MaskedLinear(StartedLinear):
    """The base of layers whose W keeps `keep` of every `of` neighbouring entries of a row. Parameters values
    (out, kept), bias (out,) or None; buffer mask (out, ceil(in / 8)) uint8. `prepare` calls `make_values`. Raises
    ValueError unless 1 <= keep <= of <= in_features, and for an unknown `prune`."""

    GROUPS = {"values": "sparse", "mask": "mask"}

    mask: Tensor

    def make_values(self, like: dict[str, Any], keep: int, of: int, prune: str) -> None:
        """The tensors of W, empty."""
        if prune not in CHOICES:
            raise ValueError(f"prune is {prune!r}; choose one of {', '.join(CHOICES)}")
        self.keep, self.of, self.prune = keep, of, prune
        kept = kept_per_row(self.in_features, keep, of)
        self.values = nn.Parameter(torch.empty(self.out_features, kept, **like))
        bits = self.values.new_empty(self.out_features, -(-self.in_features // 8), dtype=torch.uint8)
        self.register_buffer("mask", bits)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the matrix, the mask and the bias."""
        weight = self.drawn_weight(generator)
        is_random = self.prune == "random"
        scores = torch.empty_like(weight).uniform_(generator=generator) if is_random else weight.abs()
        self._choose(scores)
        self._take(weight)
        self.reset_bias(generator)

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
