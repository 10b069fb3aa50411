"""Gradient descent on normalized gradients, in pieces: the torch optimizer of kinds/scale.py.

    m <- b m + (1 - b) g, if there is a momentum b; else m = g
    weight <- weight - lr (weight_decay weight + m / rms(m))      rms along a dimension, or of the whole tensor

It is computed in float32 on pieces of whole rows, so that it takes some 32 MiB however large the tensor is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sltrain.optim.wrapper import with_gradients
from sltrain.parameters import PIECE


class NormalizedSGD(Optimizer):
    """Groups as for any torch optimizer, with "weight_decay". `dim` is that of the means: 1 for each row, 0 for each
    column, None for one of all."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, dim: int | None, momentum: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.dim, self.momentum = dim, momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "evaluate the loss before the step"
        for group, parameter in with_gradients(self):
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            grad = parameter.grad
            assert grad is not None
            if self.momentum:
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                grad = state["momentum"].lerp_(grad.to(parameter.dtype), 1 - self.momentum)
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            size = None if self.dim == 1 else root_mean_square(grad, self.dim)
            for rows, piece in row_pieces(grad):
                along = rms_of_rows(piece) if size is None else size
                parameter[rows].addcdiv_(piece, along.clamp_min(1e-8), value=-group["lr"])  # float32 inside


def rms_of_rows(piece: Tensor) -> Tensor:
    """(rows, 1), float32."""
    norms = torch.linalg.vector_norm(piece, dim=1, keepdim=True, dtype=torch.float32)
    return norms.div_(piece.shape[1] ** 0.5)


def root_mean_square(grad: Tensor, dim: int | None) -> Tensor:
    """Of each column, dim=0, or of all entries."""
    total = sum(piece.float().square().sum(dim) for _, piece in row_pieces(grad))
    assert isinstance(total, Tensor)
    return (total / (grad.numel() if dim is None else grad.shape[dim])).sqrt_()


def row_pieces(tensor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views of some rows, of at most PIECE elements or one row."""
    rows = max(1, PIECE * tensor.shape[0] // tensor.numel())
    for start in range(0, tensor.shape[0], rows):
        piece = slice(start, start + rows)
        yield piece, tensor[piece]
