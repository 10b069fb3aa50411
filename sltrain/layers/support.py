"""Which entries of S are trained: a support, drawn once and kept.

SLTrain (arXiv 2406.02214, section 3.2) trains int(sparsity * out * in) entries of S at fixed positions, drawn uniformly
at random without replacement. The published code shuffles all out * in positions and keeps the first few; that costs 8
bytes and a random swap for every entry of the dense matrix. Here the positions are drawn with replacement until enough
are distinct, which costs memory and time for the kept ones only: 2.25 million positions of a 4096 x 11008 matrix take
about 0.2 s on one core. Both give exactly the same distribution, as every step below treats all positions alike.

A support is a sorted int32 tensor of flat row-major positions, row * in_features + column: half the bytes of int64.
"""

import math

import torch
from torch import Tensor

MAX_ENTRIES = 2**31 - 1  # the largest matrix whose flat positions fit int32
SHUFFLE_LIMIT = 4096  # up to this many positions a full shuffle is the fastest way


def num_nonzero(out_features: int, in_features: int, sparsity: float) -> int:
    """Number of trained entries of S. `sparsity` is the paper's delta, the fraction that is trained (0.03: 3 %).

    Raises ValueError for a sparsity outside [0, 1) and for a matrix with more entries than int32 can number.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is the fraction of the entries of S that are trained and must be in [0, 1), got {sparsity}; "
            "the paper uses 0.03"
        )
    if out_features * in_features > MAX_ENTRIES:
        raise ValueError(
            f"a {out_features} x {in_features} matrix has more than {MAX_ENTRIES} entries, which int32 positions "
            "cannot number; split the layer, or leave it dense"
        )
    return int(sparsity * out_features * in_features)


def draw_support(
    out_features: int,
    in_features: int,
    sparsity: float,
    generator: torch.Generator | None = None,
    kind: str = "uniform",
) -> Tensor:
    """Draw the positions of S: (nnz,) int32 on the CPU, sorted and distinct, every subset of that size equally likely.

    `generator` is a CPU generator (None: torch's default one). Raises ValueError as `num_nonzero` does, and for an
    unknown `kind`.
    """
    if kind != "uniform":
        raise ValueError(f"unknown kind of support {kind!r}; known: uniform")
    count = num_nonzero(out_features, in_features, sparsity)
    return _draw_distinct(out_features * in_features, count, generator)


def _draw_distinct(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the numbers 0 .. population - 1, sorted int32, uniformly over all subsets of that size."""
    if population <= SHUFFLE_LIMIT:
        shuffled = torch.randperm(population, generator=generator, dtype=torch.int32, device="cpu")
        return shuffled[:count].sort().values
    if count > population // 2:  # fewer positions to leave out than to keep
        everything = torch.arange(population, dtype=torch.int32, device="cpu")
        return _leave_out(everything, population - count, generator)

    drawn = torch.empty(0, dtype=torch.int32, device="cpu")
    while len(drawn) < count:
        # Draws expected until `count` are distinct (coupon collector), with a margin that makes a second round rare.
        expected = population * math.log((population - len(drawn)) / (population - count))
        num_draws = int(1.02 * expected) + 16
        fresh = torch.randint(population, (num_draws,), generator=generator, dtype=torch.int32, device="cpu")
        drawn = torch.unique(torch.cat([drawn, fresh]))
    # Cutting the end off would favour small positions: the surplus is left out uniformly.
    return _leave_out(drawn, len(drawn) - count, generator)


def _leave_out(positions: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`positions` without `count` of them, chosen uniformly; the order is kept."""
    if count == 0:
        return positions
    kept = torch.ones(len(positions), dtype=torch.bool, device="cpu")
    kept[_draw_distinct(len(positions), count, generator).long()] = False
    return positions[kept]
