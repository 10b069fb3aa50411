"""The validation rows: the same in every evaluation, at every world size.

Documents in the order of the files, cut into rows as in training, until the rows hold `eval_tokens` predicted tokens
or the text ends. Batch b of `batch_size` rows belongs to rank b % world_size. Every rank tokenizes all rows once (10
million tokens: about half a minute on one core) and keeps its own, 4 bytes a token.

Each batch knows the UTF-8 bytes that its predicted tokens stand for, so that the loss can be given in bits per byte,
which does not depend on the tokenizer. The first token of a row is not predicted, and </s> stands for no text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sltrain.data.documents import DataError, Source, is_held_out
from sltrain.data.rows import check_row_shape
from sltrain.data.tokenizer import Tokenizer
from sltrain.numeric import IGNORED_LABEL

DOCUMENTS_PER_CALL = 256

Row = tuple[list[int], int]  # ids, bytes that the predicted ones stand for


@dataclass
class EvalBatch:
    """Rows of validation text."""

    input_ids: Tensor  # (rows, T) int64
    labels: Tensor  # (rows, T) int64; -100 on pads; not shifted
    num_bytes: int  # UTF-8 bytes of the predicted tokens of all rows


@dataclass
class _StoredBatch:
    input_ids: NDArray[np.int32]  # (rows, T)
    lengths: NDArray[np.int32]  # (rows,) tokens that are not pads
    num_bytes: int


class EvalSet:
    """Iterable of this rank's EvalBatch, repeatable; the text is read at the first use.

    `exhausted` says whether the text ended before `eval_tokens` predicted tokens were found; `num_targets` how many
    there are on all ranks. With holdout_every = N only the held-out documents of the source are used, those that
    TrainStream with the same N leaves out.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        padding: str,
        eval_tokens: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        holdout_every: int = 0,
    ) -> None:
        check_row_shape(padding, seq_len)
        if eval_tokens < 1:
            raise ValueError(f"eval_tokens is {eval_tokens}; an evaluation needs at least one predicted token")
        source.check()
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.padding = padding
        self.eval_tokens = eval_tokens
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.holdout_every = holdout_every
        self._batches: list[_StoredBatch] | None = None
        self._num_targets = 0

    def read(self) -> None:
        """Read the text now; otherwise the first use does. Raises DataError if there is none."""
        self._stored()

    @property
    def exhausted(self) -> bool:
        return self.num_targets < self.eval_tokens

    @property
    def num_targets(self) -> int:
        self._stored()
        return self._num_targets

    def __len__(self) -> int:
        return len(self._stored())

    def __iter__(self) -> Iterator[EvalBatch]:
        for stored in self._stored():
            input_ids = torch.from_numpy(stored.input_ids).long()
            is_pad = torch.arange(self.seq_len) >= torch.from_numpy(stored.lengths)[:, None]
            yield EvalBatch(input_ids, input_ids.masked_fill(is_pad, IGNORED_LABEL), stored.num_bytes)

    def _stored(self) -> list[_StoredBatch]:
        if self._batches is None:
            self._batches = self._read()
        return self._batches

    def _read(self) -> list[_StoredBatch]:
        batches: list[_StoredBatch] = []
        rows = self._enough_rows()
        number = 0
        while group := list(islice(rows, self.batch_size)):
            if number % self.world_size == self.rank:
                batches.append(self._store(group))
            number += 1
        if number == 0:
            part = "held-out " if self.holdout_every else ""
            raise DataError(
                f"no {part}validation documents in {self.source.name}; name other text (validation_path in training)"
            )
        return batches

    def _store(self, rows: list[Row]) -> _StoredBatch:
        input_ids = np.full((len(rows), self.seq_len), self.tokenizer.pad_id, dtype=np.int32)
        for i, (ids, _) in enumerate(rows):
            input_ids[i, : len(ids)] = ids
        lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)
        return _StoredBatch(input_ids, lengths, sum(num_bytes for _, num_bytes in rows))

    def _enough_rows(self) -> Iterator[Row]:
        self._num_targets = 0
        for row in self._packed_rows() if self.padding == "pack" else self._truncated_rows():
            if len(row[0]) < 2:
                continue  # nothing to predict
            yield row
            self._num_targets += len(row[0]) - 1
            if self._num_targets >= self.eval_tokens:
                return

    def _truncated_rows(self) -> Iterator[Row]:
        for ids, sizes in self._documents(self.seq_len):
            yield ids, sum(sizes[1:])

    def _packed_rows(self) -> Iterator[Row]:
        """Documents one after the other in rows of seq_len; the last row may be shorter."""
        ids: list[int] = []
        sizes: list[int] = []
        for more_ids, more_sizes in self._documents(None):
            ids += more_ids
            sizes += more_sizes
            while len(ids) >= self.seq_len:
                yield ids[: self.seq_len], sum(sizes[1 : self.seq_len])
                del ids[: self.seq_len], sizes[: self.seq_len]
        if ids:
            yield ids, sum(sizes[1:])

    def _documents(self, max_len: int | None) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of each validation document and the bytes that each id stands for."""
        texts = self._texts()
        while group := list(islice(texts, DOCUMENTS_PER_CALL)):
            yield from (encoded for encoded in self.tokenizer.encode_with_bytes(group, max_len) if encoded[0])

    def _texts(self) -> Iterator[str]:
        for shard in range(self.source.num_shards):
            for document in self.source.documents(shard):
                if self.holdout_every == 0 or is_held_out(document.text, self.holdout_every):
                    yield document.text
