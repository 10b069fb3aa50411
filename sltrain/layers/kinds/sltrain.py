"""W = (alpha / rank) B A + S, S on a fixed random support (SLTrain, arXiv 2406.02214)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sltrain import kernels
from sltrain.layers import cost
from sltrain.layers.aligned import autocast_dtype
from sltrain.layers.base import Footprint, Rows, cast_bytes, fill_uniform, gradient_bytes
from sltrain.layers.factors import FactoredLinear
from sltrain.layers.functional import Weight, compose_weight, composed_linear, factored_linears
from sltrain.layers.parts import Part, SparsePart
from sltrain.layers.sparse import can_share
from sltrain.layers.support import make_support
from sltrain.layers.support.base import draw_distinct
from sltrain.layers.support.uniform import UniformSupport


class SLTrainLinear(FactoredLinear, kind="sltrain"):
    """y = x W^T + bias with W = (alpha / rank) B A + S; x (..., in_features) -> (..., out_features).

    `sparsity` is the paper's delta, the fraction of the entries of S that are trained. rank = 0 trains S alone,
    sparsity = 0 trains B A alone. `support` and `block_size` choose where the entries lie (support/), `path` how the
    product is computed (functional.py): composed, factored, or auto, the cheaper of the two for the first x. It
    changes rounding, not the function, and may be set at any time. `residual` adds residual / sqrt(K) Expand(x A^T),
    K = ceil(out / rank), to y, and R A to W accordingly (residual.py). bias, generator, device and dtype are keywords,
    see StartedLinear.

    Parameters A (rank, in), B (out, rank), values (nnz,), bias (out,) or None; buffer indices, as the support draws
    them. Raises ValueError for a rank outside [0, min(in, out)], a sparsity or block size that the support cannot have,
    a residual that is no number, and where nothing is left to train.
    """

    GROUPS = FactoredLinear.GROUPS | {"values": "sparse", "indices": "indices"}
    PATHS = ("composed", "factored")
    LEAST_RANK = 0

    indices: Tensor

    def prepare(
        self,
        like: dict[str, Any],
        rank: int,
        sparsity: float,
        alpha: float,
        *,
        support: str = "uniform",
        block_size: int | None = None,
        residual: float = 0.0,
    ) -> None:
        self.make_factors(like, rank, alpha)
        self.set_residual(residual)
        self.support = make_support(self.out_features, self.in_features, sparsity, support, block_size)
        nnz = self.support.num_nonzero
        if rank == 0 and nnz == 0:
            raise ValueError(
                f"rank {rank} and sparsity {sparsity} leave nothing to train in a {self.out_features} x "
                f"{self.in_features} matrix; raise one of them"
            )
        self.values = nn.Parameter(torch.empty(nnz, **like))
        indices = self.values.new_empty(self.support.num_indices, dtype=self.support.index_dtype)
        self.register_buffer("indices", indices)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the support and every parameter."""
        self.indices.copy_(self.support.draw(generator))
        if self.starts:
            self.reset_by_starts(generator)
            return
        self.reset_factors(generator, zero_B=self.support.num_nonzero > 0)
        fill_uniform(self.values, 1 / math.sqrt(self.in_features), generator)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """B A: the nearest matrix of its rank. S: what is left of W at the positions that were drawn."""
        self.set_factors(weight)
        self._fill_values(self._left_of(weight))

    @torch.no_grad()
    def set_weight_and_support(self, weight: Tensor) -> None:
        """As `set_weight`, with S where most is left of W, as `choose_support`."""
        self.set_factors(weight)
        left = self._left_of(weight)
        if self.support.num_nonzero:
            self.choose_support(left)
        self._fill_values(left)

    def _left_of(self, weight: Tensor) -> Tensor:
        """What B A leaves of a dense matrix: (out, in) float32."""
        left = weight.detach().float().contiguous()
        return left - self._fold(self.B.float()) @ (self.scale * self.A.float()) if self.rank else left

    def _fill_values(self, left: Tensor) -> None:
        """Give each entry of S the number at its position."""
        for entries, positions in self.support.pieces(self.indices):
            self.values[entries] = left.view(-1)[positions].to(self.values.dtype)

    @torch.no_grad()
    def choose_support(self, left: Tensor) -> float:
        """Let S train the entries at which |left|, (out, in), is largest, not those that were drawn; return their share
        of the sum of squares. Values stay as they are. For support=uniform, which can have any positions."""
        assert isinstance(self.support, UniformSupport)
        squares = left.detach().float().flatten().square().cpu()
        largest = squares.topk(self.support.num_nonzero)
        self.indices.copy_(self.support.at(largest.indices.sort().values.int()))
        return (largest.values.sum() / squares.sum()).item()

    def num_moving(self, fraction: float) -> int:
        """How many entries of S this share of them is, as far as there is room elsewhere."""
        return min(int(fraction * self.support.num_nonzero), self.support.num_entries - self.support.num_nonzero)

    def free_at_random(self, count: int, generator: torch.Generator) -> Tensor:
        """So many positions where S has no entry: (count,) int64, on the CPU. For support=uniform."""
        support = self.support
        assert isinstance(support, UniformSupport)
        outside = support.num_entries - support.num_nonzero
        return support.free(self._positions(), draw_distinct(outside, count, generator).long())

    @torch.no_grad()
    def free_where_largest(self, count: int, gradient: Tensor) -> Tensor:
        """As `free_at_random`, the positions at which |gradient|, (out, in), is largest; those of the `count` entries
        that `move` will drop are free too."""
        sizes = gradient.detach().float().abs().flatten().cpu()
        sizes[self._positions()[self._largest(count)]] = -1
        return sizes.topk(count).indices.sort().values

    @torch.no_grad()
    def move(self, fresh: Tensor) -> Tensor:
        """Move the entries of S with the smallest values to these free positions, (count,) int64 and ascending, with
        value zero; return which entry each was before, (nnz,) int64, -1 for a fresh one. For support=uniform."""
        assert isinstance(self.support, UniformSupport)
        kept = self._largest(len(fresh))
        places, order = torch.cat([self._positions()[kept], fresh]).sort()
        sources = torch.cat([kept, torch.full_like(fresh, -1)])[order]
        self.indices.copy_(self.support.at(places.int()))
        sources = sources.to(self.values.device)
        rearrange(self.values, sources)
        return sources

    def _largest(self, count: int) -> Tensor:
        """All entries of S but the `count` with the smallest values, on the CPU, where all ranks and devices choose the
        same of equal ones."""
        return self.values.float().abs().cpu().argsort(stable=True)[count:]

    def _positions(self) -> Tensor:
        """The flat position of each entry of S: (nnz,) int64, on the CPU."""
        return self.support.positions(self.indices).long().cpu()

    def forward(self, x: Tensor) -> Tensor:
        if self.chosen_path(x) == "composed":
            return composed_linear(x, self._weight)
        return factored_linears(x, [self._weight])[0]

    @classmethod
    def forward_together(cls, x: Tensor, layers: "Sequence[SLTrainLinear]") -> list[Tensor]:
        """The output of each layer for the same x. Factored layers read x once for all and run no forward hooks."""
        if all(layer.chosen_path(x) == "factored" for layer in layers) and can_share(layer.support for layer in layers):
            return factored_linears(x, [layer._weight for layer in layers])
        return super().forward_together(x, layers)

    @property
    def _weight(self) -> Weight:
        return Weight(self.A, self.B, self.values, self.indices, self.support, self.scale, self.bias, self.factor)

    def parts(self) -> dict[str, Part]:
        sparse = SparsePart(self.values.detach(), self.indices, self.support)
        return super().parts() | ({"S": sparse} if self.support.num_nonzero else {})

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return compose_weight(self._weight)

    def settings(self) -> dict[str, Any]:
        s = self.support
        own = {"sparsity": s.sparsity, "support": s.kind, "block_size": s.block}
        return super().settings() | own | ({"residual": self.residual} if self.residual else {})

    def multiply_adds(self) -> int:
        return super().multiply_adds() + self.support.num_nonzero

    def choose_path(self, num_rows: int, device: torch.device) -> str:
        dtype = autocast_dtype(self.values, device.type) or self.values.dtype
        s, machine = self.support, cost.machine_kind(device, dtype)
        shape = (num_rows, self.out_features, self.in_features, self.rank)
        return cost.choose_path(*shape, s.num_nonzero, s.price, machine)

    def footprint(self, rows: Rows) -> Footprint:
        """composed: two matrices (out, in), W or dW and one intermediate, and one piece of decoded positions.
        factored: h = x A^T is kept; u = dy B and the temporaries of the products with S are not."""
        if self._planned_path(rows) == "factored":
            return _factored_footprint([self], rows)
        dense = 2 * self.out_features * self.in_features * rows.element_size + cast_bytes([self], rows)
        return Footprint(kept=0, temporary=dense + self.support.piece_bytes, gradients=gradient_bytes(self))

    @classmethod
    def footprint_together(cls, layers: "Sequence[SLTrainLinear]", rows: Rows) -> Footprint:
        is_factored = all(layer._planned_path(rows) == "factored" for layer in layers)
        if is_factored and can_share(layer.support for layer in layers):
            return _factored_footprint(layers, rows)
        return super().footprint_together(layers, rows)

    def _planned_path(self, rows: Rows) -> str:
        return self.choose_path(rows.num_rows, self.values.device) if self.path == "auto" else self.path

    def warnings(self) -> dict[str, str]:
        kind, most, limit = self.support.kind, self.support.max_rank, min(self.in_features, self.out_features)
        line = (
            f"support={kind}: W has rank at most rank + columns (the first layer: {self.rank} + {most} of {limit}), "
            "not full rank as with the other supports"
        )
        return {} if most is None else {kind: line}


@torch.no_grad()
def rearrange(of_entries: Tensor, sources: Tensor) -> None:
    """Give each of (nnz,) numbers that of the entry it comes from, in place; zero where that is -1."""
    of_entries.copy_(torch.where(sources < 0, 0, of_entries[sources.clamp(min=0)]))


def _factored_footprint(layers: Sequence[SLTrainLinear], rows: Rows) -> Footprint:
    """The bytes of one call for several layers."""
    num_rows, size = rows.num_rows, rows.element_size
    supports = [layer.support for layer in layers]
    block = supports[0].kernel_block
    if block is None or not rows.has_kernel:
        of_sparse = max(support.temporary_bytes(num_rows, size) for support in supports)
    else:
        nums = [support.num_indices if block else support.num_nonzero for support in supports]
        outs, threads = [layer.out_features for layer in layers], torch.get_num_threads()
        of_sparse = kernels.scratch_bytes(num_rows, layers[0].in_features, outs, nums, threads, "backward", block)
    return Footprint(
        kept=sum(layer.rank for layer in layers) * num_rows * size,
        temporary=max(layer.rank for layer in layers) * num_rows * size + of_sparse + 2 * cast_bytes(layers, rows),
        gradients=sum(gradient_bytes(layer) for layer in layers),
    )
