"""The validation rows: the same in every evaluation, at every world size.

Documents in the order of the files, cut into rows as in training, until the rows hold `eval_tokens` predicted tokens
or the text ends. With padding=best_fit they are packed group by group too, and the rows of a group stand in an order
that depends on their number alone: the first rows are a fair sample of long and short documents. Batch b of
`batch_size` rows belongs to rank b % world_size. Every rank tokenizes all rows once (10 million tokens: about half a
minute on one core) and keeps its own, 4 bytes a token.

`part` reads every second document: what is chosen by half a is judged on half b, whose text the choice has not seen.

Each batch knows how many UTF-8 bytes of text its predicted tokens cover, so that the loss can be given in bits per
byte, which does not depend on the tokenizer. The first token of a row is not predicted, and </s> covers no text.
"""

import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import count, islice
from typing import ClassVar

import numpy as np
from torch import Tensor

from sltrain.data.best_fit import GROUP_ROWS, packed_group
from sltrain.data.documents import DataError, Document, Source, is_held_out
from sltrain.data.logical_stream import DOCUMENTS_PER_CALL, Row
from sltrain.data.rows import check_row_shape, rows_to_tensors
from sltrain.data.token_folder import ids_with_bytes_of
from sltrain.data.tokenizer import Tokenizer
from sltrain.log import Pace

SizedRow = tuple[Row, int]  # ids, bytes that the predicted ones cover
Sized = tuple[list[int], list[int]]  # ids, and the bytes that each covers


@dataclass
class EvalBatch:
    """Rows of validation text."""

    input_ids: Tensor  # this and the following: (rows, T) int64, see rows.py
    labels: Tensor
    positions: Tensor | None  # None: attention=full
    num_bytes: int  # UTF-8 bytes that the predicted tokens of all rows cover
    source: str | None = None  # the part of a mixture that the rows come from


@dataclass(eq=False)
class EvalSet:
    """Repeatable iterable of this rank's EvalBatch. The text is read at the first use.

    Raises ValueError for impossible settings; reading raises DataError if there is no text.
    """

    source: Source
    tokenizer: Tokenizer
    _: KW_ONLY
    seq_len: int
    padding: str  # truncate_pad, pack or best_fit
    eval_tokens: int  # sys.maxsize: all of the text
    batch_size: int
    rank: int = 0
    world_size: int = 1
    per_document: bool = False  # attention=document
    holdout_every: int = 0  # N: only the held-out documents, those that TrainStream with the same N skips; 0: all
    part: str = "all"  # a: the first of these documents, the third, ...; b: the others

    sources: ClassVar[tuple[str, ...]] = ()  # this and the following: names of parts, see mixed_evaluation.py
    short_sources: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_row_shape(self.padding, self.seq_len)
        if self.eval_tokens < 1:
            raise ValueError(f"eval_tokens is {self.eval_tokens}; an evaluation needs at least one predicted token")
        self.source.check()

    def read(self) -> None:
        """Read the text now."""
        _ = self._contents

    @property
    def num_targets(self) -> int:
        """Predicted tokens on all ranks."""
        return self._contents[1]

    def share_of(self, token: int) -> float:
        """The share of this token among all ids of this rank's rows; 0 without rows."""
        ids = [row.ids for batch in self._contents[0] for row, _ in batch]
        return float(np.mean(np.concatenate(ids) == token)) if ids else 0.0

    @property
    def exhausted(self) -> bool:
        """Whether the text ended before `eval_tokens` predicted tokens were found."""
        return self.num_targets < self.eval_tokens

    def __len__(self) -> int:
        return len(self._contents[0])

    def __iter__(self) -> Iterator[EvalBatch]:
        for rows in self._contents[0]:
            tensors = rows_to_tensors([row for row, _ in rows], self.seq_len, self.tokenizer.pad_id, self.per_document)
            num_bytes = sum(num_bytes for _, num_bytes in rows)
            yield EvalBatch(tensors.input_ids, tensors.labels, tensors.positions, num_bytes)

    @cached_property
    def _contents(self) -> tuple[list[list[SizedRow]], int]:
        """The rows of this rank's batches, and the number of predicted tokens on all ranks."""
        rows, batches, num_targets = self._enough_rows(), list[list[SizedRow]](), 0
        total = None if self.eval_tokens == sys.maxsize else self.eval_tokens
        pace = Pace("read", f"tokens of {self.source.name}", total)
        for number, batch in enumerate(iter(lambda: list(islice(rows, self.batch_size)), [])):
            num_targets += sum(map(self._num_targets, (row for row, _ in batch)))
            if number % self.world_size == self.rank:
                batches.append(batch)
            pace.at(num_targets)
        if num_targets == 0:
            part = "held-out " if self.holdout_every else ""
            raise DataError(
                f"no {part}validation documents in {self.source.name}; name other text (validation_path in training)"
            )
        return batches, num_targets

    def _num_targets(self, row: Row) -> int:
        return len(row.ids) - 1 - (len(row.starts) if self.per_document else 0)

    def _enough_rows(self) -> Iterator[SizedRow]:
        missing = self.eval_tokens
        rows = {"truncate_pad": self._truncated_rows, "pack": self._packed_rows, "best_fit": self._best_fit_rows}
        for ids, sizes, starts in rows[self.padding]():
            row = Row(np.array(ids, np.int32), starts)
            if len(ids) >= 2 and self._num_targets(row):  # otherwise there is nothing to predict
                not_predicted = sum(sizes[start] for start in starts) if self.per_document else 0
                yield row, sum(sizes[1:]) - not_predicted
                missing -= self._num_targets(row)
                if missing <= 0:
                    return

    def _truncated_rows(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """As _packed_rows: the beginning of each document."""
        return ((ids, sizes, []) for ids, sizes in self._documents(self.seq_len))

    def _packed_rows(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Ids, sizes and starts of the rows of seq_len ids that the concatenated documents fill; the last row may be
        shorter."""
        ids, sizes, starts = list[int](), list[int](), list[int]()
        for more_ids, more_sizes in self._documents(None):
            if ids and more_ids:
                starts.append(len(ids))
            ids += more_ids
            sizes += more_sizes
            while len(ids) >= self.seq_len:
                yield ids[: self.seq_len], sizes[: self.seq_len], starts
                del ids[: self.seq_len], sizes[: self.seq_len]
                starts = []
        yield ids, sizes, starts

    def _best_fit_rows(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """As _packed_rows: whole documents, as many as fit, see best_fit.py."""
        chunks = (
            (ids[first : first + self.seq_len], sizes[first : first + self.seq_len])
            for ids, sizes in self._documents(None)
            for first in range(0, len(ids), self.seq_len)
        )
        for number in count():
            group = _take(chunks, GROUP_ROWS * self.seq_len)
            if not group:
                return
            for row in packed_group([len(ids) for ids, _ in group], self.seq_len, "evaluation", number):
                all_ids, all_sizes, starts = list[int](), list[int](), list[int]()
                for ids, sizes in (group[chunk] for chunk in row):
                    starts.append(len(all_ids))
                    all_ids += ids
                    all_sizes += sizes
                yield all_ids, all_sizes, starts[1:]

    def _documents(self, max_len: int | None) -> Iterator[Sized]:
        """The ids of each validation document, and the bytes that each id covers."""
        documents = (d for shard in range(self.source.num_shards) for d in self.source.documents(shard))
        own: Iterator[Document]
        own = (d for d in documents if not self.holdout_every or is_held_out(d.text, self.holdout_every))
        if self.part != "all":
            own = islice(own, "ab".index(self.part), None, 2)
        while group := list(islice(own, DOCUMENTS_PER_CALL)):
            yield from ids_with_bytes_of(group, self.tokenizer, max_len)


def _take(chunks: Iterator[Sized], num_tokens: int) -> list[Sized]:
    """The next chunks, until they hold `num_tokens`."""
    taken = list[Sized]()
    for chunk in chunks:
        taken.append(chunk)
        num_tokens -= len(chunk[0])
        if num_tokens <= 0:
            break
    return taken
