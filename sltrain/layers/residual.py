"""A residual of the rank space without parameters, y += c Expand(z) with z = A x (DLR, arXiv 2606.28932).

Expand repeats each of the r numbers of z K = ceil(out / r) times, one after the other, and cuts the row at out; in the
paper c = alpha / sqrt(K). It is linear: with R, (out, r), whose row o is the unit vector floor(o / K),

    Expand(z) = R z,   so scale B z + c Expand(z) = scale (B + c / scale R) z

computes the same from a B alone. While it trains the two stay apart: Expand is added in place, with no copy of B, and
in bfloat16 c does not round B's entries.
"""

import math

import torch
from torch import Tensor


def residual_factor(residual: float, out_features: int, rank: int) -> float:
    """c of a residual of strength `residual`, the paper's alpha. Raises ValueError for one that is no number."""
    if not math.isfinite(residual):
        raise ValueError(f"residual is {residual}; it must be a number")
    return residual / math.sqrt(-(-out_features // rank)) if rank else 0.0


def folded(B: Tensor, factor: float) -> Tensor:
    """B + factor R, (out, r) in the dtype of B; B itself where the factor is 0."""
    if factor == 0:
        return B
    out_features, rank = B.shape
    index = torch.arange(out_features, device=B.device) // -(-out_features // rank)
    return B.scatter_add(1, index[:, None], B.new_full((out_features, 1), factor))


def add_expanded(y: Tensor, z: Tensor, factor: float) -> None:
    """y (N, out) += factor Expand(z), z (N, r)."""
    times = -(-y.shape[1] // z.shape[1])
    full, left = divmod(y.shape[1], times)
    y[:, : full * times].unflatten(1, (full, times)).add_(z[:, :full, None], alpha=factor)
    if left:
        y[:, full * times :].add_(z[:, full, None], alpha=factor)


def add_gathered(grad_z: Tensor, grad_y: Tensor, factor: float) -> None:
    """The adjoint: grad_z (N, r) += factor R^T grad_y, grad_y (N, out)."""
    times = -(-grad_y.shape[1] // grad_z.shape[1])
    full, left = divmod(grad_y.shape[1], times)
    grad_z[:, :full].add_(grad_y[:, : full * times].unflatten(1, (full, times)).sum(2), alpha=factor)
    if left:
        grad_z[:, full].add_(grad_y[:, full * times :].sum(1), alpha=factor)
