"""A projection of kind cr_net, y = B A x + beta y', y' the output of the same projection one decoder layer before
(CR-Net, arXiv 2509.18993), on torch alone.

transformers calls a projection with x alone. So the projection before leaves its output here when it is called, and
this one takes it away when it is: nothing stays between two passes, and threads do not see each other's. Recomputing a
decoder layer by itself is therefore impossible, and the model refuses activation checkpointing.
"""

from threading import get_ident

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x (..., in_features) -> (..., out_features). `layer` is the entry of `layers` in config.json."""

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict | None) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(layer["rank"], in_features))
        self.B = nn.Parameter(torch.empty(out_features, layer["rank"]))
        self.beta = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.left: dict[int, Tensor] = {}  # thread -> output of the projection before

    def follow(self, before: nn.Module) -> None:
        """Take the outputs of this projection."""
        before.register_forward_hook(self.leave)

    def leave(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.left[get_ident()] = output

    def forward(self, x: Tensor) -> Tensor:
        previous = self.left.pop(get_ident())
        y = F.linear(F.linear(x, self.A), self.B, self.bias)
        return y + self.beta * previous.to(y.device)
