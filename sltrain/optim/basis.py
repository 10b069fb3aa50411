"""Bases of the shorter side of a gradient G (out, in), d = min(out, in), as float32 matrices (d, rank).

Random numbers depend on shape and `number` alone, and are drawn on the CPU, so that all ranks, devices and continued
runs have the same.
"""

import hashlib

import torch
from torch import Tensor


def normal(shape: tuple[int, ...], number: int, device: torch.device) -> Tensor:
    """Independent standard normal numbers."""
    digest = hashlib.blake2b(f"{shape} {number}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.randn(shape, generator=generator).to(device)


def leading_directions(grad: Tensor, rank: int) -> Tensor:
    """The singular vectors of the largest singular values."""
    is_tall = grad.shape[0] >= grad.shape[1]
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    return right[:rank].t() if is_tall else left[:, :rank]


def sketched_directions(grad: Tensor, rank: int, number: int) -> Tensor:
    """Nearly the same, by a randomized range finder with 8 directions more and two power iterations (Halko,
    Martinsson & Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    matrix = grad.t() if grad.shape[0] >= grad.shape[1] else grad  # (d, longer side)
    width = min(rank + 8, matrix.shape[0])
    basis, _ = torch.linalg.qr(matrix @ normal((matrix.shape[1], width), number, grad.device))
    for _ in range(2):
        other, _ = torch.linalg.qr(matrix.t() @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    left, _, _ = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left[:, :rank]
