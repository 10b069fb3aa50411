"""W of which only some entries exist, those of a mask that is chosen once: n of every m columns of each row."""

import torch
from torch import Tensor

from sltrain.layers.masked import masked_linear
from sltrain.layers.masked_linear import MaskedLinear


class SparseLinear(MaskedLinear, kind="sparse"):
    """y = x W^T + bias; x (..., in_features) -> (..., out_features). Each row of W keeps `keep` of every `of`
    neighbouring entries (masked.py); of = in_features is a row without pattern, keep = of a dense W. Tensors, start and
    refusals as in MaskedLinear; construction, meta and `generator` as in SLTrainLinear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        keep: int,
        of: int,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_std: float | None = None,
        prune: str = "random",
    ) -> None:
        super().__init__(in_features, out_features, keep, of, bias, init_std, prune, device=device, dtype=dtype)
        if not self.values.is_meta:
            self.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        return masked_linear(x, self.values, self.mask, self.bias)
