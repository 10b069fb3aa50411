"""A projection of kind sst, W = U diag(s) V (Sparse Spectral Training, arXiv 2405.15481), on torch alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x (..., in_features) -> (..., out_features). `layer` is the entry of `layers` in config.json. The columns of U,
    then those of U_rest, belong to the singular values s[order], and so do the rows of V, then of V_rest."""

    order: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict | None) -> None:
        super().__init__()
        size = min(in_features, out_features)
        rest = size - layer["rank"]
        self.s = nn.Parameter(torch.empty(size))
        self.U, self.U_rest = (nn.Parameter(torch.empty(out_features, n)) for n in (layer["rank"], rest))
        self.V, self.V_rest = (nn.Parameter(torch.empty(n, in_features)) for n in (layer["rank"], rest))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("order", torch.empty(size, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, torch.cat([self.V, self.V_rest])) * self.s[self.order]
        return F.linear(hidden, torch.cat([self.U, self.U_rest], 1), self.bias)
