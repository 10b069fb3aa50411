"""How the kinds of this package are built: their tensors first, then, unless on the meta device, their values."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.base import ReplacedLinear, fill_normal, fill_uniform


class StartedLinear(ReplacedLinear):
    """A layer that is built from its sides, the sizes and settings `own` of its kind, and what all kinds take.

    `bias` adds the parameter bias (out,). `generator` is the CPU generator of the start (None: torch's default one),
    `device` and `dtype` those of nn.Linear. `init_std` is the standard deviation of the dense matrix that the start is
    made from, or near to, in kinds with such a start; by default nn.Linear's, 1/sqrt(3 in).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *own: Any,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_std: float | None = None,
        path: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, path)
        self.init_std = 1 / math.sqrt(3 * in_features) if init_std is None else init_std
        self.prepare({"device": device, "dtype": dtype}, *own, **settings)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if not next(self.parameters()).is_meta:
            self.reset_parameters(generator)

    def prepare(self, like: dict[str, Any], *own: Any, **settings: Any) -> None:
        """Make all tensors but the bias, without values; `like` are their device and dtype. Raises ValueError for sizes
        and settings that the kind cannot have."""
        raise self._undefined("prepare")

    def check_rank(self, rank: int, least: int = 1) -> None:
        """Raise ValueError for a rank outside [least, min(in, out)]."""
        limit = min(self.in_features, self.out_features)
        if not least <= rank <= limit:
            sides = f"{self.out_features} x {self.in_features}"
            raise ValueError(f"rank must be between {least} and {limit} for a {sides} matrix, got {rank}")

    def drawn_weight(self, generator: torch.Generator | None) -> Tensor:
        """A dense start, normal with standard deviation `init_std`: (out, in) float32, on the CPU."""
        drawn = torch.empty(self.out_features, self.in_features, dtype=torch.float32, device="cpu")
        fill_normal(drawn, self.init_std, generator)
        return drawn

    def reset_bias(self, generator: torch.Generator | None) -> None:
        """Fill the bias, if there is one, as nn.Linear does: uniform in +-1/sqrt(in)."""
        if self.bias is not None:
            fill_uniform(self.bias, 1 / math.sqrt(self.in_features), generator)
