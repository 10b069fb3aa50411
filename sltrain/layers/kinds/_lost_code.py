"""A projection of kind lost, y = gamma B act(A x) + (1 - gamma) V x[columns] (LOST, arXiv 2508.02668), on torch
alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x (..., in_features) -> (..., out_features). `layer` is the entry of `layers` in config.json, `tensors` that of
    `tensors`; values are V row after row, indices the columns."""

    indices: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict) -> None:
        super().__init__()
        self.activation, self.gamma = layer["activation"], layer["gamma"]
        self.A = nn.Parameter(torch.empty(layer["rank"], in_features))
        self.B = nn.Parameter(torch.empty(out_features, layer["rank"]))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.values = nn.Parameter(torch.empty(tensors["values"]))
        self.register_buffer("indices", torch.empty(tensors["indices"], dtype=getattr(torch, tensors["dtype"])))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A)
        if self.activation != "none":
            hidden = getattr(F, self.activation)(hidden)
        y = F.linear(self.gamma * hidden, self.B, self.bias)
        columns = x.index_select(-1, self.indices.long())
        return y + F.linear(columns, (1 - self.gamma) * self.values.view(len(self.B), -1))
