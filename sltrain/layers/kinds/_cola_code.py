"""A projection of kind cola, y = B z with z = act(A x) (CoLA, arXiv 2502.10940), or dlr, which adds c Expand(z) (DLR,
arXiv 2606.28932), on torch alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x (..., in_features) -> (..., out_features). `layer` is the entry of `layers` in config.json."""

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict | None) -> None:
        super().__init__()
        self.activation, self.times = layer["activation"], -(-out_features // layer["rank"])
        self.factor = layer.get("residual", 0.0) / self.times**0.5
        self.A = nn.Parameter(torch.empty(layer["rank"], in_features))
        self.B = nn.Parameter(torch.empty(out_features, layer["rank"]))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.A)
        if self.activation != "none":
            z = getattr(F, self.activation)(z)
        y = F.linear(z, self.B, self.bias)
        if self.factor:
            y = y + self.factor * z.repeat_interleave(self.times, -1)[..., : len(self.B)]
        return y
