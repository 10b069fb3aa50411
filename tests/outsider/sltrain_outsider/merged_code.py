"""A projection of kind merged on torch alone, which compressed exports bring."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x (..., in) -> (..., out). Without factors W is W0."""

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict | None) -> None:
        super().__init__()
        self.W0 = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.scale = layer["alpha"] / layer["rank"] if layer["has_factors"] else 0.0
        if self.scale:
            self.A = nn.Parameter(torch.empty(layer["rank"], in_features))
            self.B = nn.Parameter(torch.empty(out_features, layer["rank"]))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.W0, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if self.scale else y
