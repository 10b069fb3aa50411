"""Polar factors: the nearest matrix with orthonormal rows or columns, U V^T of M = U S V^T, without a decomposition.

newton_schulz   5 cubes of degree 5 that push every singular value towards 1 and leave it in about [0.7, 1.2] (Jordan
                et al., 2024, https://kellerjordan.github.io/posts/muon/). Matrix products alone; in bfloat16 on a GPU,
                in float32 on a CPU, where bfloat16 products are slow.
qdwh            Halley's iteration with dynamic weights, through QR (Nakatsukasa, Bai & Gygi, 2010): exact to rounding
                after some 5 steps, for several times the cost.
"""

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """The orthogonalized matrix (m, n), float32. The iteration runs on the short side."""
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.t() if is_tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.t() if is_tall else x).float()


def qdwh(matrix: Tensor, steps: int = 5) -> Tensor:
    """The polar factor (m, n), float32; singular values below 1e-3 of the largest may not have reached 1."""
    is_wide = matrix.shape[0] < matrix.shape[1]
    x = (matrix.t() if is_wide else matrix).float()
    x = x / x.norm().clamp_min(1e-30)
    identity = torch.eye(x.shape[1], device=x.device)
    least = 1e-3  # a lower bound of the singular values; smaller ones converge later
    for _ in range(steps):
        a, b, c = halley_weights(least)
        q, _ = torch.linalg.qr(torch.cat([math.sqrt(c) * x, identity]))
        x = (b / c) * x + (a - b / c) / math.sqrt(c) * q[: x.shape[0]] @ q[x.shape[0] :].t()
        least = min(1.0, least * (a + b * least**2) / (1 + c * least**2))
    return x.t() if is_wide else x


def halley_weights(least: float) -> tuple[float, float, float]:
    """a, b, c of a step for singular values in [least, 1]: equations 3.6 and 3.7 of Nakatsukasa, Bai & Gygi."""
    square = least**2
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * math.sqrt(1 + d)))
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1
