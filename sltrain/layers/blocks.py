"""W as a product of two factors of which one or both are block-diagonal (Wei et al., arXiv 2406.16450).

    b blocks; h = A x; A and B are stored as matrices, block under block

    low_rank       W = B A               A (r, in), B (out, r)
    block_dense    W = B diag(A)         A (r, in/b): block j of x gives r/b entries of h; B (out, r)
    block_shuffle  W = P diag(B) P diag(A)   A (q b, in/b), B (out, q), q = min(in, out) / b; P deals the entries of h
                                         to the blocks of B in turn, entry i to block i mod b, as one deals cards, and
                                         collects y likewise (Monarch matrices: Dao et al., arXiv 2204.00595)

A place i of h belongs to one row of A and one column of B. Those that join the same blocks make a low-rank matrix of
their own part of W, so the nearest W to a given matrix is a singular value decomposition of each part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers.aligned import aligned_linear, autocast_dtype, cast_to
from sltrain.layers.parts import Part

STRUCTURES = ("low_rank", "block_dense", "block_shuffle")


@dataclass(frozen=True)
class Structure:
    """The shapes of one W. Raises ValueError for sides that the blocks do not divide, and a rank that is too large."""

    kind: str  # one of STRUCTURES
    in_features: int
    out_features: int
    rank: int  # block_shuffle has none: its h is as wide as the shorter side
    blocks: int  # low_rank has one

    def __post_init__(self) -> None:
        if self.kind not in STRUCTURES:
            raise ValueError(f"structure is {self.kind!r}; choose one of {', '.join(STRUCTURES)}")
        sides = {"in_features": self.in_features}
        sides |= {"out_features": self.out_features} if self.kind == "block_shuffle" else {"rank": self.rank}
        for name, side in sides.items():
            if self.num_blocks < 1 or side % self.num_blocks:
                raise ValueError(f"blocks={self.blocks} does not divide {name} {side}; choose a number that does")
        limit = min(self.in_features, self.num_blocks * self.out_features)
        if not 1 <= self.hidden <= limit:
            raise ValueError(
                f"rank must be between 1 and {limit} for a {self.out_features} x {self.in_features} matrix, got"
                f" {self.rank}"
            )

    @property
    def num_blocks(self) -> int:
        """Of A."""
        return 1 if self.kind == "low_rank" else self.blocks

    @property
    def hidden(self) -> int:
        """The size of h."""
        return min(self.in_features, self.out_features) if self.kind == "block_shuffle" else self.rank

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and of B."""
        width = self.hidden // self.blocks if self.kind == "block_shuffle" else self.hidden
        return (self.hidden, self.in_features // self.num_blocks), (self.out_features, width)

    def apply(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x (..., in) -> x W^T (..., out)."""
        h = aligned_linear(x, A) if self.num_blocks == 1 else block_product(x, A, self.blocks)
        if self.kind != "block_shuffle":
            return aligned_linear(h, B)
        y = block_product(h.unflatten(-1, (-1, self.blocks)).transpose(-1, -2).flatten(-2), B, self.blocks)
        return y.unflatten(-1, (self.blocks, -1)).transpose(-1, -2).flatten(-2)

    def dense(self, A: Tensor, B: Tensor) -> Tensor:
        """W (out, in)."""
        weight = A.new_empty(self.out_features, self.in_features)
        for rows, columns, a, b in self.pairs(A, B):
            weight[rows, columns] = b @ a
        return weight

    def pairs(self, A: Tensor, B: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Each part of W, by its rows and columns, and the rows of A and columns of B, views, that it is the product
        of."""
        width, height = self.in_features // self.num_blocks, self.hidden // self.num_blocks
        for k in range(self.num_blocks):
            columns, first = slice(k * width, (k + 1) * width), k * height
            if self.kind != "block_shuffle":
                places = slice(first, first + height)
                yield slice(None), columns, A[places], B[:, places]
                continue
            for block, rows in enumerate(B.chunk(self.blocks)):
                start = first + (block - first) % self.blocks  # the first place of h here that is dealt to this block
                num = len(range(start, first + height, self.blocks))
                own = A[start : first + height : self.blocks]
                dealt = slice(start // self.blocks, start // self.blocks + num)
                yield slice(block, None, self.blocks), columns, own, rows[:, dealt]


def block_product(x: Tensor, blocks: Tensor, num: int) -> Tensor:
    """Each of `num` parts of x (..., num * p) times its block (q, p) of `blocks` (num * q, p) -> (..., num * q)."""
    return _BlockProduct.apply(x, blocks, num, autocast_dtype(x))


class _BlockProduct(torch.autograd.Function):
    """Plain autograd would keep a view of x, which models/fused.py does not know again, and under autocast a cast of
    the blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, num: int, cast: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x, blocks)
        ctx.num = num
        y = torch.bmm(_parts(cast_to(x, cast), num), cast_to(blocks, cast).unflatten(0, (num, -1)).transpose(1, 2))
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        grads, grad_x, grad_blocks = _parts(grad_y, ctx.num), None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(grads, blocks.to(grad_y.dtype).unflatten(0, (ctx.num, -1)))
            grad_x = grad_x.transpose(0, 1).reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_blocks = torch.bmm(grads.transpose(1, 2), _parts(x.to(grad_y.dtype), ctx.num))
            grad_blocks = grad_blocks.flatten(0, 1).to(blocks.dtype)
        return grad_x, grad_blocks, None, None


def _parts(x: Tensor, num: int) -> Tensor:
    """x (..., num * p) -> (num, N, p)."""
    return x.reshape(-1, num, x.shape[-1] // num).transpose(0, 1)


@dataclass(frozen=True)
class StructuredPart(Part):
    """scale * W of factors A and B."""

    structure: Structure
    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0
    group = "low_rank"

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.scale * self.structure.dense(self.A, self.B)

    def norm(self) -> Tensor:
        return self.dense().float().norm()
