"""An optimizer that sees a large parameter as several small ones.

Stochastic rounding from outside (rounding.py) updates float32 copies of a parameter and of its gradient: 1 GB for the
embedding of a 7B model, and on a CPU bitsandbytes makes five more. Given pieces of at most PIECE elements, one after
the other, they need those of one piece, 0.1 GB. The result is the same, because the optimizers that get pieces work
element by element and quantize by blocks that lie inside a piece.

The last piece holds the few elements that BLOCK does not divide. bitsandbytes keeps float32 moments of it, as of every
tensor under 4,096 elements.

State and checkpoints are those of the pieces, called layer.weight#0, layer.weight#1, ...; `param_groups` are of the
whole parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.numeric import PIECE
from sltrain.optim.wrapper import WrappedOptimizer, only, with_gradients

BLOCK = 256  # of the 8-bit moments


def piece_sizes(numel: int) -> list[int]:
    """Sizes of the pieces of a parameter of `numel` elements, in order."""
    whole = numel - numel % BLOCK
    sizes = [min(PIECE, whole - first) for first in range(0, whole, PIECE)]
    return [*sizes, numel - whole] if numel > whole or not sizes else sizes


class InPieces(WrappedOptimizer):
    """Makes an optimizer over pieces work on whole parameters.

    Args:
        groups: parameter groups, with names, of contiguous parameters whose memory never moves.
        make: groups of pieces -> the optimizer of the pieces.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        self._pieces: dict[nn.Parameter, list[nn.Parameter]] = {
            parameter: [nn.Parameter(piece) for piece in _cut(parameter.detach())]
            for group in groups
            for parameter in group["params"]
        }
        super().__init__(make([self._of_pieces(group) for group in groups]))
        # With the settings that the inner optimizer completed.
        self._groups = [
            {**inner, "params": group["params"], "param_names": group["param_names"]}
            for group, inner in zip(groups, self.inner.param_groups, strict=True)
        ]

    def _of_pieces(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with pieces in place of parameters, and names such as layer.weight#3."""
        named = {
            f"{name}#{number}": piece
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for number, piece in enumerate(self._pieces[parameter])
        }
        return {**group, "params": list(named.values()), "param_names": list(named)}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, a piece at a time."""
        assert closure is None, "evaluate the loss before the step"
        for group, parameter in with_gradients(self):
            assert parameter.grad is not None
            for piece, grad in zip(self._pieces[parameter], _cut(parameter.grad), strict=True):
                piece.grad = grad
                try:
                    with only(self.inner, group, piece):
                        self.inner.step()
                finally:
                    piece.grad = None


def _cut(tensor: Tensor) -> list[Tensor]:
    return list(tensor.reshape(-1).split(piece_sizes(tensor.numel())))
