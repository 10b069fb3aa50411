"""One of the L streams that make up the training data: an endless sequence of tokenized documents with an exact
position.

The position is six numbers:

    epoch   slice   block (record index it begins at)   position in the shuffled block   offset (tokens already used)
    rows (padding=best_fit: the five are where a group of rows begins, and so many of it are used)

To resume at a position, the block is read and shuffled again (order.py), and a group is packed again (best_fit.py); no
other state is needed. When the slices are used up, the next epoch begins with the same slices in another order.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sltrain.data.best_fit import GROUP_ROWS, packed_group
from sltrain.data.documents import DataError, Document, Source
from sltrain.data.order import Slice, block_order, slice_order

Ids = NDArray[np.int32]

DOCUMENTS_PER_CALL = 256  # documents tokenized together: words repeat, and the first batch does not take long


@dataclass
class Position:
    """The position of a logical stream."""

    epoch: int = 0
    slice: int = 0  # index into this epoch's order of slices
    block: int = 0  # record index at which the shuffle block begins
    position: int = 0  # next document in the shuffled block
    offset: int = 0  # tokens of that document that are in earlier rows
    rows: int = 0  # padding=best_fit: rows used of the group that begins here


@dataclass
class Row:
    """The ids of a row, without pads, and at which places above 0 another document begins."""

    ids: NDArray[np.int32]
    starts: list[int] = field(default_factory=list)


def _every(index: int) -> bool:
    """The `wanted` of a whole shard that other processes read too: a source deletes only what one process reads."""
    return True


def joined(parts: list[Ids]) -> Row:
    """The row of these documents or pieces of them, one after the other."""
    ends = np.cumsum([len(part) for part in parts])
    return Row(np.concatenate(parts), ends[:-1].tolist())


@dataclass
class LogicalStream:
    """Logical stream `number`; see the head of this file. Reading raises DataError if an epoch has no document, and
    whatever the source raises."""

    source: Source
    number: int
    slices: list[Slice]
    seed: int
    shuffle_block: int
    dealing: str  # KEYED or MODULO, see order.py
    encode: Callable[[list[Document]], list[Ids]]  # documents -> the ids of each
    keep: Callable[[Document], bool]  # whether a document is trained on
    at: Position  # where to begin: a position that this stream had before, in this process or another
    is_shared: bool = False  # whether another rank reads it too, so that a shard stays when this one has read it

    def __post_init__(self) -> None:
        self._found_any = self.at != Position()  # whether this epoch has had a document
        self._order: list[Slice] | None = None  # of this epoch
        self._reader: Iterator[Document] | None = None  # continues after the current block
        self._block: list[Document] | None = None  # shuffled
        self._next_block = self.at.block  # record index after the current block
        self._tokenized: tuple[int, list[Ids]] = (-1, [])  # group of the block, ids of its documents
        self._group: list[Row] = []  # padding=best_fit: rows of the group at self.at that are not used, the next last
        self._after_group = self.at
        self._announce(0)

    @property
    def epochs(self) -> dict[str, int]:
        """How often the corpus has been read to its end, by the name that messages call it."""
        return {"the data": self.at.epoch}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by source: those of one alone are not counted."""
        return {}

    def row(self, padding: str, seq_len: int) -> Row:
        """The next row of at most `seq_len` ids."""
        if padding == "pack":
            return self.packed_row(seq_len)
        return self.best_fit_row(seq_len) if padding == "best_fit" else self.truncated_row()

    def truncated_row(self) -> Row:
        """The ids of the next document."""
        row = Row(self._ids())
        self._advance()
        return row

    def packed_row(self, seq_len: int) -> Row:
        """The next seq_len ids of the concatenated documents."""
        parts, missing = list[Ids](), seq_len
        while missing:
            ids = self._ids()
            parts.append(ids[self.at.offset : self.at.offset + missing])
            missing -= len(parts[-1])
            self.at.offset += len(parts[-1])
            if self.at.offset == len(ids):
                self._advance()
        return joined(parts)

    def best_fit_row(self, seq_len: int) -> Row:
        """The next row of the group that begins at self.at."""
        if not self._group:
            self._group = self._read_group(seq_len)
        row = self._group.pop()
        self.at.rows += 1
        if not self._group:
            self.at = self._after_group
        return row

    def _read_group(self, seq_len: int) -> list[Row]:
        """The rows of the group at self.at that are not used, the next one last. A group ends with its epoch, so that
        no row holds a document twice."""
        self._ids()  # leaves a block that is used up, so that self.at is in the epoch of the group
        start, chunks, missing = replace(self.at), list[Ids](), GROUP_ROWS * seq_len
        self.at.rows = 0
        while missing > 0:
            ids = self._ids()
            if self.at.epoch != start.epoch:
                break
            chunks.append(ids[self.at.offset : self.at.offset + seq_len])
            missing -= len(chunks[-1])
            self.at.offset += len(chunks[-1])
            if self.at.offset == len(ids):
                self._advance()
        self._after_group, self.at = self.at, start
        key = self.seed, self.number, astuple(replace(start, rows=0))
        group = [joined([chunks[i] for i in row]) for row in packed_group(list(map(len, chunks)), seq_len, *key)]
        return group[start.rows :][::-1]

    def _ids(self) -> Ids:
        """All ids of the current document, which has at least one."""
        while True:
            if self._block is None:
                self._read_block()
            elif self.at.position >= len(self._block):
                self._leave_block()
            elif len(ids := self._tokenize(self._block, self.at.position)):
                self._found_any = True
                return ids
            else:
                self.at.position += 1

    def _advance(self) -> None:
        self.at.position += 1
        self.at.offset = 0

    def _tokenize(self, block: list[Document], position: int) -> Ids:
        group, member = divmod(position, DOCUMENTS_PER_CALL)
        if self._tokenized[0] != group:
            first = group * DOCUMENTS_PER_CALL
            self._tokenized = group, self.encode(block[first : first + DOCUMENTS_PER_CALL])
        return self._tokenized[1][member]

    def _read_block(self) -> None:
        """Read and shuffle the block at self.at.block; it is empty at the end of the slice."""
        if self._order is None:
            self._order = slice_order(self.slices, self.seed, self.at.epoch, self.number)
        part = self._order[self.at.slice]
        if self._reader is None:
            wanted = part.wanted(self.seed, self.dealing)
            if wanted is None and self.is_shared:
                wanted = _every
            self._reader = self.source.documents(part.shard, self.at.block, wanted)
            self._announce(1)
        kept = list(islice(filter(self.keep, self._reader), self.shuffle_block))
        indices = [document.index for document in kept]
        order = block_order(indices, self.seed, self.at.epoch, part) if kept else []
        self._block = [kept[i] for i in order]
        self._next_block = indices[-1] + 1 if kept else self.at.block
        self._tokenized = -1, []

    def _announce(self, ahead: int) -> None:
        """Tell a source that can prepare a shard which one this stream reads `ahead` slices from here."""
        expect = getattr(self.source, "expect", None)
        if expect is not None:
            epochs, place = divmod(self.at.slice + ahead, len(self.slices))
            expect(slice_order(self.slices, self.seed, self.at.epoch + epochs, self.number)[place].shard)

    def _leave_block(self) -> None:
        """Go to the next block, slice or epoch."""
        is_last = len(self._block or []) < self.shuffle_block
        self._block = None
        self.at.block, self.at.position, self.at.offset = self._next_block, 0, 0
        if not is_last:
            return
        self._reader = None
        self.at.block = 0
        self.at.slice += 1
        if self.at.slice == len(self.slices):
            if not self._found_any:
                raise DataError(
                    f"no documents in {self.source.name} for data stream {self.number}: it has no usable text, or "
                    "fewer documents than data.num_streams; supply more text, or lower data.num_streams"
                )
            self.at.slice, self._order, self._found_any = 0, None, False
            self.at.epoch += 1
