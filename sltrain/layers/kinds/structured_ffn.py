"""W of a structure with fewer parameters (layers/blocks.py), which a dense matrix may guide at the beginning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.aligned import aligned_linear
from sltrain.layers.base import Footprint, Rows, cast_bytes, gradient_bytes
from sltrain.layers.blocks import Structure, StructuredPart
from sltrain.layers.factors import largest_singular_values, orthonormal
from sltrain.layers.parts import DensePart, Part
from sltrain.layers.started import StartedLinear


class StructuredLinear(StartedLinear, kind="structured_ffn"):
    """y = x W^T + bias, with a guide y = g x G^T + (1 - g) x W^T + bias; x (..., in) -> (..., out).

    Parameters A, B as `Structure` has them, bias (out,) or None; with a guide also guide (out, in) and the buffer
    share, g, 0-d float32. low_rank starts as the nearest matrix to a normal one of standard deviation `init_std`; the
    others with orthonormal rows or columns in each block, times `gain`. Raises ValueError as `Structure`.
    """

    GROUPS = {"A": "low_rank", "B": "low_rank"}

    share: Tensor

    def prepare(
        self, like: dict[str, Any], structure: str, rank: int, blocks: int, has_guide: bool = False, gain: float = 1.0
    ) -> None:
        self.structure = Structure(structure, self.in_features, self.out_features, rank, blocks)
        self.gain, self.has_guide = gain, False
        self.A, self.B = (nn.Parameter(torch.empty(shape, **like)) for shape in self.structure.shapes)
        if has_guide:
            self.add_guide()

    def add_guide(self) -> None:
        """Make the dense matrix and its share, without values."""
        self.guide = nn.Parameter(self.A.new_empty(self.out_features, self.in_features))
        self.register_buffer("share", self.A.new_empty((), dtype=torch.float32))
        self.has_guide = True

    @torch.no_grad()
    def start_guide(self, share: float) -> None:
        """Let the guide be W, so that the function stays, and count for `share` of the output."""
        self.guide.copy_(self.structure.dense(self.A, self.B))
        self.share.fill_(share)

    def drop_guide(self) -> None:
        """Free the dense matrix; the function stays if its share is 0."""
        del self.guide, self.share
        self.has_guide = False

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors and the bias; a guide then is their product."""
        if self.structure.kind == "low_rank":
            values = largest_singular_values(self.out_features, self.in_features, self.structure.rank).float()
            roots = (self.gain * self.init_std * values).sqrt()
            self.A.copy_(roots[:, None] * orthonormal(self.in_features, len(roots), generator).t())
            self.B.copy_(orthonormal(self.out_features, len(roots), generator) * roots)
        else:
            for block in self.A.chunk(self.structure.blocks):
                block.copy_(semi_orthonormal(block.shape[0], block.shape[1], generator))
            for block in self.B.chunk(self.structure.blocks if self.structure.kind == "block_shuffle" else 1):
                block.copy_(self.gain * semi_orthonormal(block.shape[0], block.shape[1], generator))
        self.reset_bias(generator)
        if self.has_guide:
            self.start_guide(1.0)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """The nearest matrix of this structure; the guide is the matrix itself."""
        matrix = weight.detach().float().to(self.A.device)
        for rows, columns, a, b in self.structure.pairs(self.A, self.B):
            left, values, right = torch.linalg.svd(matrix[rows, columns], full_matrices=False)
            roots = values[: len(a)].sqrt()
            a.copy_(roots[:, None] * right[: len(a)])
            b.copy_(left[:, : len(a)] * roots)
        if self.has_guide:
            self.guide.copy_(weight)

    def copy_trained(self, read: Callable[[str], Tensor]) -> None:
        """The guide's share stays: it says how far a run is."""
        super().copy_trained(lambda name: self.share if name == "share" else read(name))

    def forward(self, x: Tensor) -> Tensor:
        y = self.structure.apply(x, self.A, self.B)
        if self.has_guide:
            y = torch.lerp(y, aligned_linear(x, self.guide), self.share.to(y.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def parts(self) -> dict[str, Part]:
        A, B = self.A.detach(), self.B.detach()
        if not self.has_guide:
            return {"W": StructuredPart(self.structure, A, B)}
        guide = DensePart(self.guide.detach(), self.share)
        return {"W": StructuredPart(self.structure, A, B, 1 - self.share), "guide": guide}

    def settings(self) -> dict[str, Any]:
        s = self.structure
        return {"structure": s.kind, "rank": s.rank, "blocks": s.blocks, "has_guide": self.has_guide}

    @property
    def num_trained(self) -> int:
        """Without the guide, which does not stay."""
        return self.A.numel() + self.B.numel()

    def multiply_adds(self) -> int:
        guide = self.in_features * self.out_features if self.has_guide else 0
        return self.A.numel() + self.B.numel() + guide

    def footprint(self, rows: Rows) -> Footprint:
        """h is kept. Besides there are its gradient, with blocks the dx that is put in order, and with a guide an
        output gradient and a dx of its own; its share is cast if need be."""
        size = rows.num_rows * rows.element_size
        hidden = size * self.structure.hidden
        blocked = size * self.in_features if self.structure.kind != "low_rank" else 0
        guided = size * (self.in_features + self.out_features) if self.has_guide else 0
        cast = rows.element_size if self.has_guide and rows.element_size != self.share.element_size() else 0
        temporary = hidden + max(blocked, guided) + 2 * cast_bytes([self], rows)
        return Footprint(hidden + cast, temporary, gradient_bytes(self))


def semi_orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A matrix of orthonormal rows or columns, whichever are fewer: float32, on the CPU."""
    return orthonormal(rows, columns, generator) if rows >= columns else orthonormal(columns, rows, generator).t()
