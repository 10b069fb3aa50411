"""The orthonormal basis of the discrete cosine transform, q_k[j] = s_k cos(pi (j + 1/2) k / d), for the shorter side of
a gradient G (out, in), d = min(out, in). It is fixed, so that a subspace is a list of numbers k, and all inner products
with G are one fast transform (Makhoul, 1980).
"""

import math

import torch
from torch import Tensor


def transform(grad: Tensor) -> Tensor:
    """G Q if out >= in, else Q^T G: the inner products with all d basis vectors, of the shape of `grad`, float32."""
    rows = grad if grad.shape[0] >= grad.shape[1] else grad.t()
    d = rows.shape[1]
    reordered = torch.cat([rows[:, ::2], rows[:, 1::2].flip(1)], dim=1)
    angles = torch.arange(d, device=grad.device) * (-math.pi / (2 * d))
    turned = torch.fft.fft(reordered) * torch.polar(torch.ones_like(angles), angles)
    products = turned.real * math.sqrt(2 / d)
    products[:, 0] /= math.sqrt(2)
    return products if grad.shape[0] >= grad.shape[1] else products.t()


def vectors(d: int, numbers: Tensor) -> Tensor:
    """The basis vectors of these numbers, (d, len(numbers)), float32."""
    positions = torch.arange(d, device=numbers.device, dtype=torch.float32) + 0.5
    k = numbers.float()
    values = torch.cos(positions[:, None] * k * (math.pi / d)) * math.sqrt(2 / d)
    return torch.where(k == 0, values / math.sqrt(2), values)


def strongest(products: Tensor, is_tall: bool, rank: int) -> Tensor:
    """The numbers of the `rank` basis vectors whose products have the largest sum of magnitudes, ascending."""
    sizes = products.abs().sum(0 if is_tall else 1)
    return sizes.topk(rank).indices.sort().values
