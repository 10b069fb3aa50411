"""A projection of kind cola, y = B act(A x) (CoLA, arXiv 2502.10940), on torch alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x (..., in_features) -> (..., out_features). `layer` is the entry of `layers` in config.json."""

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict | None) -> None:
        super().__init__()
        self.activation = layer["activation"]
        self.A = nn.Parameter(torch.empty(layer["rank"], in_features))
        self.B = nn.Parameter(torch.empty(out_features, layer["rank"]))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A)
        if self.activation != "none":
            hidden = getattr(F, self.activation)(hidden)
        return F.linear(hidden, self.B, self.bias)
