"""The order of the corpus: which stream reads which documents, and in which order, in every epoch.

1. Slices. A corpus of n shards is read by L logical streams. If n >= L each shard is one slice; if not, each is cut
   in c = L / gcd(n, L) slices, slice j holding the records with index % c == j, so that n * c is a multiple of L.
2. Dealing. The slices, permuted by the seed alone, are dealt round-robin to the streams: a document belongs to one
   stream for good.
3. Shuffling. In each epoch a stream reads its slices in an order of its own, and each slice in blocks of B
   consecutive documents that are shuffled one by one. No document leaves its block, so a position is a few numbers.

A permutation sorts by a keyed BLAKE2 hash of the element. Libraries change their generators between releases; a hash
never changes, and any position of any epoch can be computed without the ones before it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from math import gcd
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """The records of `shard` with index % step == offset."""

    shard: int
    offset: int
    step: int


def permuted(items: Iterable[T], *key: object) -> list[T]:
    """The items in an order that depends on their repr and on `key` alone."""
    salt = repr(key)
    return sorted(items, key=lambda item: blake2b(f"{salt}{item!r}".encode(), digest_size=16).digest())


def num_logical_streams(global_batch_size: int, num_streams: int) -> int:
    """The largest divisor of global_batch_size that is at most num_streams."""
    if num_streams < 1:
        raise ValueError(f"data.num_streams is {num_streams}; it must be at least 1")
    return next(n for n in range(min(num_streams, global_batch_size), 0, -1) if global_batch_size % n == 0)


def deal_slices(num_shards: int, num_streams: int, seed: int) -> list[list[Slice]]:
    """The slices of each stream; every record of the corpus is in exactly one slice of one stream."""
    cuts = 1 if num_shards >= num_streams else num_streams // gcd(num_shards, num_streams)
    slices = [Slice(shard, offset, cuts) for shard in range(num_shards) for offset in range(cuts)]
    dealt = permuted(slices, "deal", seed)
    return [dealt[stream::num_streams] for stream in range(num_streams)]


def slice_order(slices: list[Slice], seed: int, epoch: int, stream: int) -> list[Slice]:
    """The order in which a stream reads its slices in an epoch."""
    return permuted(slices, "slices", seed, epoch, stream)


def block_order(indices: list[int], seed: int, epoch: int, part: Slice) -> list[int]:
    """Positions into `indices` (record indices of one block) in shuffled order."""
    return permuted(range(len(indices)), "block", seed, epoch, part.shard, part.offset, part.step, indices[0])
