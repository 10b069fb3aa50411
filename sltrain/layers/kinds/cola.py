"""y = B act(A x): a low-rank projection with an activation between its factors (CoLA, arXiv 2502.10940, equation 3)."""

from typing import Any

import torch
from torch import Tensor

from sltrain.layers.activated import NONE, activated_linear, check_activation
from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, cast_bytes, fill_normal, gradient_bytes
from sltrain.layers.factors import FactoredLinear


class CoLALinear(FactoredLinear, kind="cola"):
    """y = act(x A^T) B^T + bias; x (..., in_features) -> (..., out_features).

    Parameters A (rank, in), B (out, rank), bias (out,) or None. Both factors start normal with standard deviation
    sqrt(gain) rank^(-1/4) (in + out)^(-1/4), so that B A has entries of variance gain^2 / (in + out); gain 1 is the
    authors' code. `activation` is one of ACTIVATIONS (layers/activated.py); then there is no W. With none, W = B A.
    `recompute` tells the decoder to keep `hidden(x)` alone for backward (models/llama.py); the layer by itself keeps x
    and that. Raises ValueError for a rank outside [1, min(in, out)] and an unknown activation.
    """

    CODE = "_cola_code.py"

    def prepare(
        self, like: dict[str, Any], rank: int, activation: str = "silu", recompute: bool = False, gain: float = 1.0
    ) -> None:
        self.make_factors(like, rank)
        check_activation(activation)
        self.activation, self.is_mergeable, self.recompute = activation, activation == NONE, recompute
        self.gain = gain

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        std = self.gain**0.5 * (self.rank * (self.in_features + self.out_features)) ** -0.25
        fill_normal(self.A, std, generator)
        fill_normal(self.B, std, generator)
        if self.bias is not None:
            self.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """h = x A^T, (..., rank)."""
        return aligned_linear(x, self.A)

    def output(self, hidden: Tensor) -> Tensor:
        """y from h, of which nothing else is kept for backward."""
        return activated_linear(hidden, self.B, self.bias, self.activation)

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "activation": self.activation}

    def footprint(self, rows: Rows) -> Footprint:
        """h = x A^T is kept; act(h) and its gradient are temporary."""
        hidden = rows.num_rows * self.rank * rows.element_size
        return Footprint(hidden, 2 * hidden + 2 * cast_bytes([self], rows), gradients=gradient_bytes(self))
