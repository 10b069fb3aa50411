"""How much memory linear layers need besides their parameters, for N rows of x of element size e.

    kept          from forward to backward, besides x itself, which layers of the same x keep once:
                  factored   h = x A^T of each layer, N r e
                  low-rank   the same
                  composed, dense   nothing
    temporary     at most at once inside forward or backward, besides x, y and their gradients:
                  composed   W or dW and what it is made of or taken apart into, (out, in) each; a piece of positions
                  factored   u = dy B, N r e, and a slice of S made dense, its gradient and a piece of positions, or
                             what blocks or columns gather of x, or the scratch memory of the CPU kernel
                  low-rank   u
    gradients     of the parameters of one call, which all come at once

Counted in bytes from shapes alone, so it works on the meta device. The temporaries are bounds of the largest terms: in
a whole model they are a few per cent of the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sltrain.kernels.cpu_kernel import scratch_bytes
from sltrain.layers.linear import LowRankLinear, SLTrainLinear
from sltrain.layers.sparse import NUM_SLICES


@dataclass(frozen=True)
class Footprint:
    """Bytes of the layers that are applied to one x."""

    kept: int
    temporary: int
    gradients: int


def footprint(layers: Sequence[nn.Module], num_rows: int, has_kernel: bool) -> Footprint:
    """The footprint of layers applied to the same x (num_rows, in). Raises ValueError for a kind of layer that is not
    accounted for."""
    size = next(layers[0].parameters()).element_size()
    gradients = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    sparse = [layer for layer in layers if isinstance(layer, SLTrainLinear) and layer.path == "factored"]
    if len(sparse) == len(layers):
        return Footprint(
            kept=sum(layer.rank for layer in sparse) * num_rows * size,
            temporary=_factored_temporary(sparse, num_rows, size, has_kernel),
            gradients=sum(gradients),
        )
    parts = [_alone(layer, num_rows, size, has_kernel) for layer in layers]
    return Footprint(sum(kept for kept, _ in parts), max(temporary for _, temporary in parts), max(gradients))


def _alone(layer: nn.Module, num_rows: int, size: int, has_kernel: bool) -> tuple[int, int]:
    """(kept, temporary) of a layer that shares nothing but x."""
    if isinstance(layer, SLTrainLinear):
        hidden = num_rows * layer.rank * size
        if layer.path == "factored":
            return hidden, _factored_temporary([layer], num_rows, size, has_kernel)
        return 0, 2 * layer.out_features * layer.in_features * size + layer.support.piece_bytes
    if isinstance(layer, LowRankLinear):
        return num_rows * layer.rank * size, num_rows * layer.rank * size
    if isinstance(layer, nn.Linear):
        return 0, 0
    raise ValueError(f"no memory is accounted for layers of kind {type(layer).__name__}: add it to layers/footprint.py")


def _without_kernel(layer: SLTrainLinear, num_rows: int, size: int) -> int:
    support = layer.support
    if support.kind == "block":  # each block row gathers the columns of x that it reads
        lines = max(support.grid)
        gathered = num_rows * -(-support.num_indices // min(support.grid)) * min(support.grid) * support.block
        padded = num_rows * lines * support.block
        return (2 * gathered + padded + 3 * support.num_indices * support.block**2) * size
    return 2 * layer.out_features * layer.in_features * size // NUM_SLICES + support.piece_bytes


def _factored_temporary(layers: Sequence[SLTrainLinear], num_rows: int, size: int, has_kernel: bool) -> int:
    hidden = num_rows * max(layer.rank for layer in layers) * size
    first = layers[0].support
    if first.kind == "column":
        return hidden + max(layer.support.num_columns for layer in layers) * (num_rows + layers[0].out_features) * size
    if not has_kernel:
        return hidden + max(_without_kernel(layer, num_rows, size) for layer in layers)
    block = first.block if first.kind == "block" else 0
    nums = [layer.support.num_indices if block else layer.support.num_nonzero for layer in layers]
    outs = [layer.out_features for layer in layers]
    threads = torch.get_num_threads()
    return hidden + scratch_bytes(num_rows, layers[0].in_features, outs, nums, threads, "backward", block)
