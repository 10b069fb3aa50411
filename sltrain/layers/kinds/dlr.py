"""y = B z + c Expand(z), z = act(A x): a low-rank projection with a fixed residual of the rank space (DLR,
arXiv 2606.28932)."""

from typing import Any

import torch
from torch import Tensor

from sltrain.layers.activated import NONE, activated_linear
from sltrain.layers.kinds.cola import CoLALinear


class DLRLinear(CoLALinear, kind="dlr"):
    """y = z B^T + residual / sqrt(K) Expand(z) + bias, z = act(x A^T), K = ceil(out / rank); x (..., in_features) ->
    (..., out_features).

    With Expand and its matrix R of layers/residual.py W = (B + residual / sqrt(K) R) A; with an activation the layer
    with that B is one of kind cola. Parameters, start and errors as CoLALinear's; also raises ValueError for a residual
    that is no number.
    """

    def prepare(
        self, like: dict[str, Any], rank: int, activation: str = NONE, *own: Any, residual: float = 1.0, **settings: Any
    ) -> None:
        super().prepare(like, rank, activation, *own, **settings)
        self.set_residual(residual)

    def output(self, hidden: Tensor) -> Tensor:
        return activated_linear(hidden, self.B, self.bias, self.activation, residual=self.factor)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """The nearest matrix of this rank, residual included. Raises ValueError with an activation."""
        self.check_mergeable()
        self.set_factors(weight)

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "residual": self.residual, "activation": self.activation}
