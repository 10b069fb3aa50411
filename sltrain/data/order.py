"""The order of the corpus: which stream reads which documents, and in which order, in every epoch.

1. Dealing. The shards, permuted by the seed, are dealt to the L streams. If every stream then has about the same
   amount of text, as with C4, each shard is one slice, and a rank opens only the files of the streams it reads. If not
   (few files, or files of different sizes), every shard is cut into L slices, and every stream gets one of each: a
   stream with less text would repeat it more often. Each run of L consecutive records has one record for each slice;
   a keyed hash draws which. Records in a regular order (title, body, title, body) are thus spread over all streams,
   where index % L would give some streams nothing but titles.
2. A document belongs to one stream in every epoch.
3. Shuffling. In each epoch a stream permutes its slices, and reads each slice in blocks of B consecutive documents,
   each shuffled by itself. No document leaves its block, so a position is a few numbers.

A permutation sorts by a keyed BLAKE2 hash of the element. Libraries change their generators between releases; a hash
never changes, and any position of any epoch can be computed without those before it.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, shake_128
from itertools import accumulate
from typing import TypeVar

from sltrain.data.documents import Wanted

T = TypeVar("T")
KEYED = "keyed"  # how the records of a shard are dealt to its slices: by a hash, or
MODULO = "modulo"  # by index % L, in runs whose checkpoints do not name their dealing
DEALINGS = (KEYED, MODULO)
MAX_IMBALANCE = 1.1  # between the streams with the most and the least text, for dealing whole shards


@dataclass(frozen=True, repr=False)
class Slice:
    """One of the `count` slices of a shard: number `member`, holding one of every `count` consecutive records."""

    shard: int
    member: int
    count: int

    def __repr__(self) -> str:  # slice_order hashes it: another text would change the order of stored runs
        return f"Slice(shard={self.shard}, offset={self.member}, step={self.count})"

    def wanted(self, seed: int, dealing: str) -> Wanted | None:
        """Whether a record belongs to this slice, by its index; None: the whole shard does."""
        if self.count == 1:
            return None
        if dealing == MODULO:
            return lambda index: index % self.count == self.member
        known_run, place = -1, -1  # of the last run of `count` records: the place in it of this slice's record

        def is_wanted(index: int) -> bool:
            nonlocal known_run, place
            run, place_of_index = divmod(index, self.count)
            if run != known_run:
                known_run, place = run, dealt_members(self.count, "record", seed, self.shard, run).index(self.member)
            return place_of_index == place

        return is_wanted


def permuted(items: Iterable[T], *key: object) -> list[T]:
    """The items, in an order that depends on their repr and on `key` only."""
    salt = repr(key)
    return sorted(items, key=lambda item: blake2b(f"{salt}{item!r}".encode(), digest_size=16).digest())


def dealt_members(count: int, *key: object) -> list[int]:
    """The numbers 0 .. count - 1 in an order that depends on `key` and `count`, from one hash."""
    digest = shake_128(repr((*key, count)).encode()).digest(8 * count)
    return sorted(range(count), key=struct.unpack(f"<{count}Q", digest).__getitem__)


def drawn(weights: Sequence[float], *key: object) -> int:
    """The index of one of `weights`, each with a probability in proportion to it, by a hash of `key`."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64 * sum(weights)  # uniform in [0, sum)
    below = accumulate(weights)
    return next((index for index, end in enumerate(below) if point < end), len(weights) - 1)


def num_logical_streams(global_batch_size: int, num_streams: int) -> int:
    """The largest divisor of global_batch_size that is at most num_streams. Raises ValueError for num_streams < 1."""
    if num_streams < 1:
        raise ValueError(f"data.num_streams is {num_streams}; it must be at least 1")
    return next(n for n in range(min(num_streams, global_batch_size), 0, -1) if global_batch_size % n == 0)


def rows_of_rank(global_batch_size: int, rank: int, world_size: int) -> range:
    """The rows of every global batch that a rank trains on: as many as each other rank, in rank order. Raises
    ValueError if the batch does not divide."""
    rows, left = divmod(global_batch_size, world_size)
    if left:
        raise ValueError(f"global_batch_size={global_batch_size} does not divide among {world_size} processes")
    return range(rank * rows, (rank + 1) * rows)


def deal_slices(shard_sizes: Sequence[int], num_streams: int, seed: int) -> list[list[Slice]]:
    """The slices of each stream; every record of the corpus is in exactly one of them. `shard_sizes` have any common
    unit."""
    shards = permuted(range(len(shard_sizes)), "deal", seed)
    whole = [[Slice(shard, 0, 1) for shard in shards[stream::num_streams]] for stream in range(num_streams)]
    loads = [sum(shard_sizes[part.shard] for part in slices) for slices in whole]
    if min(loads) > 0 and max(loads) <= MAX_IMBALANCE * min(loads):
        return whole
    return [
        [Slice(shard, (stream + place) % num_streams, num_streams) for place, shard in enumerate(shards)]
        for stream in range(num_streams)
    ]


def slice_order(slices: list[Slice], seed: int, epoch: int, stream: int) -> list[Slice]:
    """The slices of a stream in the order in which it reads them in an epoch."""
    return permuted(slices, "slices", seed, epoch, stream)


def block_order(indices: list[int], seed: int, epoch: int, part: Slice) -> list[int]:
    """A permutation of range(len(indices)), for the block of slice `part` that has these record indices."""
    return permuted(range(len(indices)), "block", seed, epoch, part.shard, part.member, part.count, indices[0])
