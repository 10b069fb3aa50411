"""The training stream: documents -> shuffled, tokenized, padded or packed batches, each with the state to resume
after it.

The rows of global batch k depend on (seed, k) alone. Documents are dealt to L logical streams (order.py), L being the
largest divisor of global_batch_size (G) that is at most num_streams. Row i of every batch comes from stream i // (G /
L), and rank r of W owns the streams r * L / W to (r + 1) * L / W - 1. Hence two ranks train the curve of one, and a
run may be continued on another number of ranks.

Every stream goes through its own documents once an epoch and then begins again in another order. Its position is five
numbers:

    epoch    slice    block (record index it starts at)    position in the shuffled block    offset (tokens of that
    document already used)

To resume, the block is read and shuffled again. Batch.state holds the position of every stream of this rank after the
batch, because the stream itself runs ahead in a background thread.

Rows. truncate_pad: one document a row, its first tokens and </s>, padded on the right; pads have the label -100.
pack: documents one after the other without gaps; a row begins where the last row of its stream ended.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sltrain.data.documents import DataError, Document, Source, is_held_out
from sltrain.data.order import Slice, block_order, deal_slices, num_logical_streams, slice_order
from sltrain.data.prefetch import Prefetcher
from sltrain.data.tokenizer import Tokenizer

IGNORED_LABEL = -100
DOCUMENTS_PER_CALL = 64  # documents tokenized together: enough for Rust's threads, few enough for a quick first batch
IDENTITY = "identity"  # key of Batch.state beside the stream numbers: what the positions refer to
CORPUS = "the corpus (path, files or Python release)"

State = dict[str, dict[str, Any]]  # JSON-able


@dataclass
class Batch:
    """This rank's rows of one global batch."""

    input_ids: Tensor  # (rows, T) int64
    labels: Tensor  # (rows, T) int64; -100 on pads; not shifted
    num_tokens: int  # tokens that are not pads
    num_targets: int  # labels[:, 1:] that are not -100
    epoch: int  # epochs that this rank's most advanced stream has finished
    state: State  # stream number -> position after this batch, and IDENTITY -> what the positions refer to


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

    `encode` gives the ids of each of a list of texts; `keep` says which documents are trained on; `at` is a position that
    this stream had before, in this process or another.
    """

    def __init__(
        self,
        source: Source,
        number: int,
        slices: list[Slice],
        seed: int,
        shuffle_block: int,
        encode: Callable[[list[str]], list[list[int]]],
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
        self._tokenized: tuple[int, list[list[int]]] = (-1, [])  # group of the block, ids of its documents

    def ids(self) -> list[int]:
        """All ids of the current document, which has at least one."""
        while True:
            if self._block is None:
                self._read_block()
            elif self.at.position >= len(self._block):
                self._leave_block()
            elif ids := self._tokenize(self.at.position):
                self._found_any = True
                return ids
            else:
                self.at.position += 1

    def advance(self) -> None:
        """Go to the next document."""
        self.at.position += 1
        self.at.offset = 0

    def truncated_row(self) -> list[int]:
        """The next document."""
        row = self.ids()
        self.advance()
        return row

    def packed_row(self, seq_len: int) -> list[int]:
        """The next seq_len tokens of the concatenated documents."""
        row: list[int] = []
        while len(row) < seq_len:
            ids = self.ids()
            part = ids[self.at.offset : self.at.offset + seq_len - len(row)]
            row += part
            self.at.offset += len(part)
            if self.at.offset == len(ids):
                self.advance()
        return row

    def _tokenize(self, position: int) -> list[int]:
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
        share = f"stream {self.number} of the data" if self.number else "the data"
        return (
            f"no documents for {share} in {self.source.name}: it has no usable text, or fewer documents than "
            "data.num_streams; give more text, or lower data.num_streams"
        )


class TrainStream:
    """Endless iterator of Batch: this rank's rows of the global batches, in order.

    Args:
        seed: decides the order together with global_batch_size and num_streams.
        padding: truncate_pad or pack.
        holdout_every: one document in this many is never trained on (0: all are).
        on_event: gets a line when the corpus begins again; called from the background thread.
        prefetch: batches kept ready.

    Raises ValueError (also DataError) for what the user can mend; the iterator raises DataError or NetworkError when
    the corpus gives out.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seed: int,
        seq_len: int,
        padding: str,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_streams: int = 8,
        shuffle_block: int = 1024,
        holdout_every: int = 0,
        on_event: Callable[[str], None] = print,
        prefetch: int = 4,
    ) -> None:
        check_row_shape(padding, seq_len)
        if shuffle_block < 1 or holdout_every < 0 or holdout_every == 1:
            raise ValueError(
                f"data.shuffle_block is {shuffle_block} and data.holdout_every is {holdout_every}; "
                "the first must be at least 1, the second 0 (nothing is held out) or at least 2"
            )
        num_logical = num_logical_streams(global_batch_size, num_streams)
        if num_logical % world_size:
            raise ValueError(
                f"{world_size} ranks cannot share {num_logical} data streams evenly (the largest divisor of "
                f"global_batch_size={global_batch_size} up to data.num_streams={num_streams}); make both of them "
                f"multiples of {world_size}"
            )
        source.check()
        self.source = source
        self.tokenizer = tokenizer
        self.seed = seed
        self.seq_len = seq_len
        self.padding = padding
        self.shuffle_block = shuffle_block
        self.holdout_every = holdout_every
        self.on_event = on_event
        self.prefetch = prefetch
        self.rows_per_stream = global_batch_size // num_logical
        self._slices = deal_slices(source.num_shards, num_logical, seed)
        self._own = range(rank * num_logical // world_size, (rank + 1) * num_logical // world_size)
        self._identity = {
            "corpus": source.fingerprint(),
            "tokenizer": tokenizer.fingerprint(),
            "seed": seed,
            "seq_len": seq_len,
            "padding": padding,
            "global_batch_size": global_batch_size,
            "data.num_streams": num_logical,
            "data.shuffle_block": shuffle_block,
            "data.holdout_every": holdout_every,
        }
        self._state = self._stamp({number: Position() for number in self._own})
        self._ahead: Prefetcher[Batch] | None = None

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = Prefetcher(self._batches(self._state), self.prefetch)
        batch = next(self._ahead)
        self._state = batch.state
        return batch

    def state_dict(self) -> State:
        """The state of the last batch given out. Those of all ranks, merged, are the state of the run."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Go on after the batch that carried `state`; it must hold this rank's streams and may hold the others'.

        Raises ValueError if the corpus or a setting that decides the rows is another one.
        """
        for key, new in self._identity.items():
            old = state.get(IDENTITY, {}).get(key)
            if old != new:
                raise ValueError(
                    f"{CORPUS if key == 'corpus' else key} has changed since the checkpoint: it was {old}, "
                    f"now it is {new}; continue with the old one, or start a new run"
                )
        self.close()
        self._state = self._stamp({number: Position(**state[str(number)]) for number in self._own})

    def close(self) -> None:
        """Stop the background thread. Iterating again goes on after the last batch given out."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _batches(self, state: State) -> Iterator[Batch]:
        """The batches after `state`. Shares nothing that changes with the consumer, which runs in another thread."""
        streams = [self._logical_stream(number, Position(**state[str(number)])) for number in self._own]
        last_epoch = max(stream.at.epoch for stream in streams)
        while True:
            rows = [self._row(stream) for stream in streams for _ in range(self.rows_per_stream)]
            epoch = max(stream.at.epoch for stream in streams)
            if epoch > last_epoch:
                last_epoch = epoch
                self.on_event(f"epoch {epoch + 1} of the data begins: its documents come again in another order")
            input_ids, labels = rows_to_tensors(rows, self.seq_len, self.tokenizer.pad_id)
            num_tokens = sum(map(len, rows))
            stamp = self._stamp({stream.number: stream.at for stream in streams})
            yield Batch(input_ids, labels, num_tokens, num_tokens - len(rows), epoch, stamp)

    def _logical_stream(self, number: int, at: Position) -> LogicalStream:
        max_len = self.seq_len if self.padding == "truncate_pad" else None
        return LogicalStream(
            self.source,
            number,
            self._slices[number],
            self.seed,
            self.shuffle_block,
            encode=lambda texts: self.tokenizer.encode_batch(texts, max_len),
            keep=lambda text: not is_held_out(text, self.holdout_every),
            at=at,
        )

    def _row(self, stream: LogicalStream) -> list[int]:
        return stream.packed_row(self.seq_len) if self.padding == "pack" else stream.truncated_row()

    def _stamp(self, positions: dict[int, Position]) -> State:
        return {IDENTITY: self._identity, **{str(number): asdict(at) for number, at in positions.items()}}


def check_row_shape(padding: str, seq_len: int) -> None:
    """Raise ValueError for a padding or length that no row can have."""
    if padding not in ("truncate_pad", "pack"):
        raise ValueError(f"padding is {padding!r}; it must be truncate_pad or pack")
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a row needs at least 2 tokens, one to read and one to predict")


def rows_to_tensors(rows: list[list[int]], seq_len: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of at most seq_len ids -> input_ids and labels, (rows, seq_len) int64, padded on the right."""
    input_ids = np.full((len(rows), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq_len), IGNORED_LABEL, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = labels[i, : len(row)] = row
    return torch.from_numpy(input_ids), torch.from_numpy(labels)
