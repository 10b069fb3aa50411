"""The CPU kernel against the dense formula in float64, and what happens where it cannot be built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sltrain.layers import cpu_kernel

kernel = pytest.mark.skipif("cpu_kernel.status() is not None", reason="no CPU kernel here")

SHAPES = [  # tokens, in, outs of a group, share of entries; one to three registers, tiles and threads, and odd rests
    (64, 32, [16], 0.1),
    (129, 37, [21], 0.2),
    (1, 1, [1], 1.0),
    (3, 3, [1, 3], 0.5),
    (200, 100, [70, 33, 5], 0.05),
    (77, 1376, [40], 0.03),
    (40, 16, [2736, 11], 0.03),
    (18, 130, [17], 1.0),
    (31, 12800, [3], 0.01),
    (0, 9, [4, 2], 0.3),
    (50, 20, [30, 7], 0.0),
]


class Problem:
    """x, gradients and several S, dense (float64) and as the kernel takes them. block=0: single entries."""

    def __init__(self, n: int, in_features: int, outs: list[int], density: float, block: int = 0, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        side = max(block, 1)
        self.block, self.outs = block, outs
        self.x = torch.randn(n, in_features, generator=generator)
        self.grads = [torch.randn(n, out, generator=generator) for out in outs]
        self.dense, self.masks, self.places = [], [], []
        for out in outs:
            chosen = torch.rand(-(-out // side), -(-in_features // side), generator=generator) < density
            mask = chosen.repeat_interleave(side, 0).repeat_interleave(side, 1)[:out, :in_features]
            self.dense.append(torch.randn(out, in_features, generator=generator) * mask)
            self.masks.append(mask)
            self.places.append(chosen.flatten().nonzero().flatten().int())
        self.values = [self.sparse(d, i) for i, d in enumerate(self.dense)]

    def sparse(self, dense: torch.Tensor, i: int) -> torch.Tensor:
        """The values of S_i: (nnz,), or (T, b, b) with zeros outside the matrix."""
        if not self.block:
            return dense[self.masks[i]]
        b, (out, in_features) = self.block, dense.shape
        padded = torch.nn.functional.pad(dense, (0, -in_features % b, 0, -out % b))
        grid = padded.view(padded.shape[0] // b, b, padded.shape[1] // b, b).transpose(1, 2)
        return grid.reshape(-1, b, b)[self.places[i].long()]

    def forward(self) -> list[torch.Tensor]:
        function = cpu_kernel.block_forward if self.block else cpu_kernel.sparse_forward
        return function(self.x, self.values, self.places, self.outs, *([self.block] if self.block else []))

    def backward(self) -> list[torch.Tensor]:
        function = cpu_kernel.block_backward if self.block else cpu_kernel.sparse_backward
        return function(self.x, self.grads, self.values, self.places, *([self.block] if self.block else []))

    def expected(self) -> list[torch.Tensor]:
        x = self.x.double()
        grads, dense = [g.double() for g in self.grads], [d.double() for d in self.dense]
        grad_x = sum((g @ d for g, d in zip(grads, dense, strict=True)), torch.zeros_like(x))
        grad_values = [self.sparse(g.t() @ x * self.masks[i], i) for i, g in enumerate(grads)]
        return [*(x @ d.t() for d in dense), grad_x, *grad_values]


@kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("block", [0, 1, 5, 16, 24, 32])
@pytest.mark.parametrize(("n", "in_features", "outs", "density"), SHAPES)
def test_equals_the_dense_formula(n, in_features, outs, density, block, threads) -> None:
    problem = Problem(n, in_features, outs, density, block)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = problem.forward() + problem.backward()
    finally:
        torch.set_num_threads(before)
    for result, right in zip(results, problem.expected(), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-4)
