"""The layers of ReLoRA (arXiv 2307.05695): W = W0 + (alpha / rank) B A, whose factors are merged into W0 now and then,
and the dense one of its warm start."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.adapted import AdaptedLinear
from sltrain.layers.aligned import AlignedLinear
from sltrain.layers.base import fill_uniform


class ReLoRALinear(AdaptedLinear, kind="relora"):
    """y = x W^T + bias with W = W0 + (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    A starts uniform in +-1/sqrt(in) and B zero, after each merge too: with both zero, neither would get a gradient.
    """

    @torch.no_grad()
    def start_factors(self, generator: torch.Generator | None) -> None:
        """Draw A and make B zero: W is then W0."""
        fill_uniform(self.A, 1 / math.sqrt(self.in_features), generator)
        self.B.zero_()

    @torch.no_grad()
    def merge(self, generator: torch.Generator | None) -> None:
        """Add (alpha / rank) B A to W0 and start the factors again. W stays, up to the rounding of W0."""
        self.absorb(self.B, self.A, self.scale, generator)
        self.start_factors(generator)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """W0 is the matrix, and B zero."""
        self.W0.copy_(weight)
        self.B.zero_()


class WarmLinear(AlignedLinear):
    """The dense layer of a warm start, which knows the factors that it will be given, and the settings of its W0, then
    `frozen`. Takes over the tensors of `linear`; raises ValueError for a rank that its shape cannot have, and as
    ReLoRALinear."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, **frozen: Any) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.frozen = rank, alpha, frozen
        self._adapted(0.0)

    def adapted(self, init_std: float) -> ReLoRALinear:
        """The layer whose W0 is this one's weight, not a copy unless in another dtype; its factors have memory and no
        values."""
        layer, device = self._adapted(init_std), self.weight.device
        layer.W0, layer.bias = nn.Parameter(self.weight.detach().to(layer.W0.dtype), requires_grad=False), self.bias
        layer.A, layer.B = (nn.Parameter(torch.empty_like(each, device=device)) for each in (layer.A, layer.B))
        return layer

    def _adapted(self, init_std: float) -> ReLoRALinear:
        like: dict[str, Any] = {"bias": self.bias is not None, "device": "meta", "dtype": self.weight.dtype}
        own = like | self.frozen
        return ReLoRALinear(self.in_features, self.out_features, self.rank, self.alpha, init_std=init_std, **own)
