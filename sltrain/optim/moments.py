"""Adam's two running averages, for optimizers that take them of something else than the whole gradient.

m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2            kept in the dtype of the weights or in float32
c = sqrt(1 - b2^t) / (1 - b1^t)                               what m / sqrt(v) of update t is multiplied by: both
                                                              averages begin at zero (Kingma & Ba, arXiv 1412.6980)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def new_averages(weight: "Tensor", shape: Sequence[int], dtype: "torch.dtype | None" = None) -> "dict[str, Tensor]":
    """Averages of tensors of this shape, zero, where `weight` is and in `dtype` (None: that of `weight`)."""
    return {key: weight.new_zeros(shape, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}


def averages(grad: "Tensor", state: dict[str, Any], betas: Sequence[float]) -> "tuple[Tensor, Tensor]":
    """m and v, float32, once those of `state` have taken in `grad`."""
    first, second = state["exp_avg"], state["exp_avg_sq"]
    mean = first.lerp_(grad.to(first.dtype), 1 - betas[0]).float()
    squares = second.lerp_(grad.square().to(second.dtype), 1 - betas[1]).float()
    return mean, squares


def bias_correction(step: int, betas: Sequence[float]) -> float:
    """c of update `step`, from 1."""
    return float((1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step))
