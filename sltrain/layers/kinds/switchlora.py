"""W = W0 + (alpha / rank) B A with spare vectors for B and A: the rows of A and the columns of B that are trained are
exchanged for others, and W0 takes up the difference (SwitchLoRA, arXiv 2406.06564).

Each layer has two rings of spare vectors, of A's rows and of B's columns. An exchange takes the next of the ring and
leaves in its place what it replaces, so a vector comes back, as it was trained, once all others have been there. Rows
go in order from 0, columns from rank // 2: the counterpart of a new row is never the next to be exchanged.

    vectors are uniform, with the standard deviations    std_A = (r sqrt(out) / in^1.5)^(1/4) / 3^(1/4)
                                                         std_B = (r / sqrt(out in))^(1/4) / 3^(1/4)

At these a step of A and one of B move W by about as much, and with alpha = 1 the entries of (alpha / rank) B A have the
variance of nn.Linear's.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.layers.adapted import AdaptedLinear
from sltrain.layers.base import Footprint, Rows, fill_uniform


class SwitchLoRALinear(AdaptedLinear, kind="switchlora"):
    """y = x W^T + bias with W = W0 + (alpha / rank) B A; x (..., in_features) -> (..., out_features).

    Beside the parameters of AdaptedLinear it has buffers: spare_A (n, in) and spare_B (n, out), the rings, with
    n = candidates - rank; rest_A and rest_B (rank,) int32, for how many more updates a row or column gets no gradient;
    num_switched (1,) int64, how many rows, and as many columns, were exchanged so far. `candidates` are the vectors of
    either factor, spare ones included (None: as many as the smaller side). W0 starts so that W is normal with standard
    deviation `init_std`. Raises ValueError also for candidates below the rank.
    """

    GROUPS = AdaptedLinear.GROUPS | {
        "spare_A": "spare", "spare_B": "spare", "rest_A": "mask", "rest_B": "mask", "num_switched": "mask"
    }  # fmt: skip

    spare_A: Tensor
    spare_B: Tensor
    rest_A: Tensor
    rest_B: Tensor
    num_switched: Tensor

    def prepare(
        self, like: dict[str, Any], rank: int, alpha: float, *, candidates: int | None = None, **frozen: Any
    ) -> None:
        super().prepare(like, rank, alpha, **frozen)
        self.candidates = min(self.in_features, self.out_features) if candidates is None else candidates
        if self.candidates < self.rank:
            raise ValueError(f"candidates={self.candidates} are fewer than rank={self.rank}, which are among them")
        num_spare, new = self.candidates - self.rank, self.A.new_empty
        self.register_buffer("spare_A", new(num_spare, self.in_features))
        self.register_buffer("spare_B", new(num_spare, self.out_features))
        self.register_buffer("rest_A", new(self.rank, dtype=torch.int32))
        self.register_buffer("rest_B", new(self.rank, dtype=torch.int32))
        self.register_buffer("num_switched", new(1, dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        for tensor in (self.rest_A, self.rest_B, self.num_switched):
            tensor.zero_()
        self.absorb(self.B, self.A, -self.scale)

    @torch.no_grad()
    def start_factors(self, generator: torch.Generator | None) -> None:
        """Draw all vectors."""
        # The gain of Kaiming's formula for leaky ReLU with a slope of sqrt(5), 1/sqrt(3), is split between them.
        std_A = (self.rank * math.sqrt(self.out_features / self.in_features) / self.in_features / 3) ** 0.25
        std_B = (self.rank / math.sqrt(self.out_features * self.in_features) / 3) ** 0.25
        for vectors, std in ((self.A, std_A), (self.spare_A, std_A), (self.B, std_B), (self.spare_B, std_B)):
            fill_uniform(vectors, math.sqrt(3) * std, generator)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """W0 is what is left of the matrix beside B A."""
        self.W0.copy_(weight)
        self.absorb(self.B, self.A, -self.scale)

    @torch.no_grad()
    def pass_update(self) -> None:
        """Count an update: vectors without gradient have one less to wait."""
        for rest in (self.rest_A, self.rest_B):
            rest.sub_(1).clamp_(min=0)

    @torch.no_grad()
    def switch(self, wanted: int, freeze: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Exchange up to `wanted` rows of A and as many columns of B for the next spare ones. W stays, up to the
        rounding of W0. The counterpart of each, the column of B that a new row is multiplied by and the row of A of a
        new column, gets no gradient for `freeze` updates. Return these columns and rows. `generator` is that of
        stochastic rounding.

        As many as there are spare, and none that still waits, is exchanged."""
        done, half, num_spare = int(self.num_switched), self.rank // 2, len(self.spare_A)
        waiting = max(int((rest > 0).sum()) for rest in (self.rest_A, self.rest_B))
        number = max(0, min(wanted, half - waiting, num_spare))
        counted = torch.arange(done, done + number, device=self.W0.device)
        rows, columns, spare = counted % self.rank, (counted + half) % self.rank, counted % max(1, num_spare)
        old_A, new_A = self.A[rows], self.spare_A[spare]
        self.absorb(self.B[:, rows], old_A - new_A, self.scale, generator)
        self.A[rows], self.spare_A[spare] = new_A, old_A
        old_B, new_B = self.B[:, columns], self.spare_B[spare].t()
        self.absorb(old_B - new_B, self.A[columns], self.scale, generator)
        self.B[:, columns], self.spare_B[spare] = new_B, old_B.t()
        self.rest_B[rows], self.rest_A[columns] = freeze, freeze
        self.num_switched += number
        return rows, columns

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, whose waiting rows and columns get a gradient of zero."""
        trained_A, trained_B = (self.rest_A == 0)[:, None], self.rest_B == 0
        return _WithGradient.apply(self.A, trained_A), _WithGradient.apply(self.B, trained_B)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"candidates": self.candidates}

    def footprint(self, rows: Rows) -> Footprint:
        """One gradient exists before and after its mask."""
        own, factor = super().footprint(rows), max(self.A.numel(), self.B.numel()) * self.A.element_size()
        return dataclasses.replace(own, temporary=own.temporary + factor)


class _WithGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is multiplied by a mask that broadcasts to it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask, None
