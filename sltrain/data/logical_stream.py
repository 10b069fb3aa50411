"""One of the L streams that make up the training data: an endless sequence of tokenized documents with an exact
position.

The position is five numbers:

    epoch   slice   block (record index it begins at)   position in the shuffled block   offset (tokens already used)

To go to a position, the block is read and shuffled again (order.py); nothing else is remembered. When the slices are
used up, the next epoch begins with the same slices in another order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sltrain.data.documents import DataError, Document, Source
from sltrain.data.order import Slice, block_order, slice_order

Ids = NDArray[np.int32]

DOCUMENTS_PER_CALL = 256  # documents tokenized together: enough to meet words twice, few enough for a quick first batch


@dataclass
class Position:
    """Where a logical stream stands."""

    epoch: int = 0
    slice: int = 0  # number in this epoch's order of slices
    block: int = 0  # record index at which the shuffle block begins
    position: int = 0  # next document in the shuffled block
    offset: int = 0  # tokens of that document that are in earlier rows


class LogicalStream:
    """One of the L streams: an endless sequence of tokenized documents with an exact position.

    `encode` gives the ids of each of a list of texts; `keep` says which documents are trained on; `at` is a position
    that this stream had before, in this process or another.
    """

    def __init__(
        self,
        source: Source,
        number: int,
        slices: list[Slice],
        seed: int,
        shuffle_block: int,
        encode: Callable[[list[str]], list[Ids]],
        keep: Callable[[str], bool],
        at: Position,
    ) -> None:
        self.source = source
        self.number = number
        self.slices = slices
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.encode = encode
        self.keep = keep
        self.at = at
        self._found_any = at != Position()  # whether this epoch has given a document so far
        self._order: list[Slice] | None = None  # of this epoch
        self._reader: Iterator[Document] | None = None  # stands behind the current block
        self._block: list[str] | None = None  # shuffled texts
        self._next_block = at.block  # record index behind the current block
        self._tokenized: tuple[int, list[Ids]] = (-1, [])  # group of the block, ids of its documents

    def ids(self) -> Ids:
        """All ids of the current document, which has at least one."""
        while True:
            if self._block is None:
                self._read_block()
            elif self.at.position >= len(self._block):
                self._leave_block()
            elif len(ids := self._tokenize(self.at.position)):
                self._found_any = True
                return ids
            else:
                self.at.position += 1

    def advance(self) -> None:
        """Go to the next document."""
        self.at.position += 1
        self.at.offset = 0

    def truncated_row(self) -> Ids:
        """The next document."""
        row = self.ids()
        self.advance()
        return row

    def packed_row(self, seq_len: int) -> Ids:
        """The next seq_len tokens of the concatenated documents."""
        parts: list[Ids] = []
        missing = seq_len
        while missing:
            ids = self.ids()
            parts.append(ids[self.at.offset : self.at.offset + missing])
            missing -= len(parts[-1])
            self.at.offset += len(parts[-1])
            if self.at.offset == len(ids):
                self.advance()
        return np.concatenate(parts)

    def _tokenize(self, position: int) -> Ids:
        assert self._block is not None
        group, member = divmod(position, DOCUMENTS_PER_CALL)
        if self._tokenized[0] != group:
            first = group * DOCUMENTS_PER_CALL
            self._tokenized = group, self.encode(self._block[first : first + DOCUMENTS_PER_CALL])
        return self._tokenized[1][member]

    def _read_block(self) -> None:
        """Read and shuffle the block at self.at.block; it is empty at the end of the slice."""
        if self._order is None:
            self._order = slice_order(self.slices, self.seed, self.at.epoch, self.number)
        part = self._order[self.at.slice]
        if self._reader is None:
            self._reader = self.source.documents(part.shard, self.at.block, part.step, part.offset)
        indices, texts = [], []
        for document in self._reader:
            if self.keep(document.text):
                indices.append(document.index)
                texts.append(document.text)
                if len(texts) == self.shuffle_block:
                    break
        order = block_order(indices, self.seed, self.at.epoch, part) if indices else []
        self._block = [texts[i] for i in order]
        self._next_block = indices[-1] + 1 if indices else self.at.block
        self._tokenized = -1, []

    def _leave_block(self) -> None:
        """Go to the block, slice or epoch behind the current block."""
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
                raise DataError(self._nothing_found())
            self.at.slice, self._order, self._found_any = 0, None, False
            self.at.epoch += 1

    def _nothing_found(self) -> str:
        return (
            f"no documents in {self.source.name} for data stream {self.number}: it has no usable text, or fewer "
            "documents than data.num_streams; give more text, or lower data.num_streams"
        )
