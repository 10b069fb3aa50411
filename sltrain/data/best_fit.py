"""Best-fit packing, padding=best_fit: rows filled with whole documents, so that few are cut (Ding et al., Fewer
Truncations Improve Language Modeling, arXiv 2404.10830).

1. A document longer than a row is cut into chunks of a row's length; what is left of it, and a document that fits into
   a row, is a chunk by itself.
2. The chunks of a group, the next GROUP_ROWS rows' worth of text, are taken by decreasing length, and each goes into
   the fullest row that has room for it, or else into a new one.
3. Within a row, chunks stand in the order in which they were read. The rows of a group come in an order drawn by a
   hash: as they are opened, rows of long chunks would all come first.

What remains free in a row is padded. Groups are small enough to be packed again when a run continues in the middle of
one, and large enough that few positions stay free; conf/README.md has figures.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from sltrain.data.order import permuted

GROUP_ROWS = 128  # runs that continue count on it: another number packs other rows


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that hold every item once, in the order in which they are opened: each the numbers of its items, ascending.
    `lengths` are from 1 to `capacity`, which those of a row together do not exceed. Of equal lengths the item with the
    lower number goes first, of equally full rows the one that was opened first is filled."""
    rows = list[list[int]]()
    room = list[tuple[int, int]]()  # (what is free, row), ascending, of the rows that are not full
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect_left(room, (lengths[item], -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if free > lengths[item]:
            insort(room, (free - lengths[item], row))
    return [sorted(row) for row in rows]


def packed_group(lengths: Sequence[int], seq_len: int, *key: object) -> list[list[int]]:
    """The rows of one group of chunks with these lengths, each the numbers of its chunks; `key` decides their order."""
    rows = best_fit_decreasing(lengths, seq_len)
    return [rows[number] for number in permuted(range(len(rows)), "rows", *key)]
