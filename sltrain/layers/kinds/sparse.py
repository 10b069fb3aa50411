"""W of which only some entries exist, those of a mask that is chosen once: n of every m columns of each row."""

from typing import Any

from torch import Tensor

from sltrain.layers.masked import masked_linear
from sltrain.layers.masked_linear import MaskedLinear


class SparseLinear(MaskedLinear, kind="sparse"):
    """y = x W^T + bias; x (..., in_features) -> (..., out_features). Each row of W keeps `keep` of every `of`
    neighbouring entries (masked.py); of = in_features is a row without pattern, keep = of a dense W. Tensors, start and
    refusals as in MaskedLinear."""

    def prepare(self, like: dict[str, Any], keep: int, of: int, prune: str = "random") -> None:
        self.make_values(like, keep, of, prune)

    def forward(self, x: Tensor) -> Tensor:
        return masked_linear(x, self.values, self.mask, self.bias)
