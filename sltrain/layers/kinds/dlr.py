"""y = B z + c Expand(z), z = act(A x): a low-rank projection with a fixed residual of the rank space (DLR,
arXiv 2606.28932)."""

import math
from typing import Any

import torch
from torch import Tensor

from sltrain.layers.activated import NONE, activated_linear, expand_index
from sltrain.layers.aligned import aligned_linear
from sltrain.layers.kinds.cola import CoLALinear
from sltrain.layers.parts import LowRankPart, Part


class DLRLinear(CoLALinear, kind="dlr"):
    """y = z B^T + residual / sqrt(K) Expand(z) + bias, z = act(x A^T), K = ceil(out / rank); x (..., in_features) ->
    (..., out_features).

    Expand repeats each entry of z K times and cuts the row at out. It is linear, so B + residual / sqrt(K) R, where row
    o of R is the unit vector floor(o / K), computes the same: without an activation W = (B + residual / sqrt(K) R) A,
    and with one the layer is one of kind cola. Parameters, start and errors as CoLALinear's; also raises ValueError for
    a residual that is no number.
    """

    CODE = "_dlr_code.py"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        residual: float = 1.0,
        activation: str = NONE,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not math.isfinite(residual):
            raise ValueError(f"residual is {residual}; it must be a number")
        super().__init__(in_features, out_features, rank, activation, bias, generator, device, dtype)
        self.residual, self.factor = residual, residual / math.sqrt(-(-out_features // rank))

    def forward(self, x: Tensor) -> Tensor:
        hidden = aligned_linear(x, self.A)
        return activated_linear(hidden, self.B, self.bias, self.activation, residual=self.factor)

    @torch.no_grad()
    def folded(self) -> Tensor:
        """B + residual / sqrt(K) R, (out, rank): the B of the layer without a residual that computes the same."""
        index = expand_index(self.out_features, self.rank).to(self.B.device)
        return self.B.scatter_add(1, index[:, None], self.B.new_full((self.out_features, 1), self.factor))

    def parts(self) -> dict[str, Part]:
        return {"BA": LowRankPart(self.folded(), self.A.detach())}

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """The nearest matrix of this rank, residual included. Raises ValueError with an activation."""
        self.check_mergeable()
        self.set_factors(weight)
        self.B.sub_(self.folded() - self.B)

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "residual": self.residual, "activation": self.activation}
