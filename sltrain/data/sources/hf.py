"""data=hf: any data set that the `datasets` library opens, of the Hugging Face Hub or on this machine.

Its shards are ours: the row groups of Parquet files, other files whole, or all records as one shard where they can be
read at any position (a folder that `save_to_disk` wrote, and data.streaming=false). Records are counted in the order of
the files, unusable ones included; dealing and shuffling are sltrain's own (data/order.py), because the buffer of
`datasets` does not resume exactly. To resume inside a shard, the part before the position is read and not converted.
"""

import logging
import lzma
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from gzip import BadGzipFile
from typing import Any, ClassVar

import numpy as np

from sltrain.data.documents import BadData, DataError, Document, Source
from sltrain.data.download import hub_error, is_of_network, named
from sltrain.data.hf_dataset import Choice, Opened, commit_of, open_dataset
from sltrain.data.sources.base import SOURCES, SourceConfig
from sltrain.log import ANY_RANK

logger = logging.getLogger(__name__)

ROWS_PER_READ = 512
GIVE_UP_AFTER = 300.0  # seconds without a record, after what datasets retries by itself
FIRST_WAIT = 1.0  # seconds before a shard is opened again; doubled every time


@SOURCES.register("hf")
@dataclass
class HuggingFace(SourceConfig):
    """Options of data=hf."""

    repo: str | None = None  # OWNER/NAME on the Hub, a folder of data files, or one that save_to_disk wrote
    config: str | None = None  # configuration (subset); None: the only one
    split: str | None = None  # None: train
    validation_split: str | None = None  # None: one in holdout_every training documents is held out
    revision: str | None = None  # branch, tag or commit; None: the newest commit
    commit: str | None = None  # what `revision` stood for when the run began; the run sets it
    files: Any = None  # a glob inside the repository or a list of them; None: as the repository says
    text_key: str = "text"  # the column that holds the documents
    streaming: bool = True  # false: convert all of it to Arrow files in the cache of datasets first
    on_bad_data: str = "skip"  # skip or stop

    SETTLED: ClassVar[tuple[str, ...]] = ("commit",)

    def check(self) -> None:
        super().check()
        if not self.repo:
            raise ValueError("data=hf needs repo=OWNER/NAME, a data set on the Hugging Face Hub, or repo=FOLDER")

    def settled(self) -> SourceConfig:
        assert self.repo is not None
        folder = os.path.expanduser(self.repo)  # not in `check`: a trained model can be read where its text is not
        if os.path.isfile(folder):
            raise ValueError(f"repo={self.repo} is a file; use data=local path={self.repo}, or name its folder")
        if not os.path.isdir(folder) and (self.repo.startswith((".", "/", "~")) or self.repo.count("/") != 1):
            raise ValueError(f"repo={self.repo} is neither a folder here nor a name on the Hub (OWNER/NAME)")
        self.commit = self.commit or commit_of(self.repo, self.revision)
        return self

    def adopt(self, settled: SourceConfig) -> None:
        if isinstance(settled, HuggingFace) and (settled.repo, settled.revision) == (self.repo, self.revision):
            self.commit = self.commit or settled.commit

    def open_training(self) -> Source:
        return self._open(self.split or "train")

    def open_validation(self) -> Source | None:
        return self._open(self.validation_split) if self.validation_split else None

    def _open(self, split: str) -> "DatasetSource":
        assert self.repo is not None
        self.settled()
        opened = open_dataset(
            Choice(self.repo, self.config, split, self.commit, self.files, self.text_key, self.streaming)
        )
        name = " ".join(part for part in (self.repo, self.config, split) if part)
        return DatasetSource(name, opened, self.on_bad_data)


@dataclass(eq=False)
class DatasetSource:
    """One column of a split as a source."""

    name: str
    opened: Opened
    on_bad_data: str = "skip"

    def __post_init__(self) -> None:
        self.num_shards = len(self.opened.sizes)
        self.bad = BadData(self.on_bad_data)

    def fingerprint(self) -> str:
        return f"{self.opened.identity}, column {self.opened.column}"

    def shard_sizes(self) -> list[int]:
        return self.opened.sizes

    def check(self) -> None:
        """Nothing to check: the first records have been read to find the columns."""

    def documents(self, shard: int, start: int = 0, wanted: Callable[[int], bool] | None = None) -> Iterator[Document]:
        for first, column in self._columns(shard, start):
            indices = range(first, first + len(column))
            chosen = list(indices if wanted is None else filter(wanted, indices))
            if len(chosen) < len(column):
                column = column.take(np.array(chosen, np.int64) - first)
            for index, text in zip(chosen, column.to_pylist(), strict=True):
                if not isinstance(text, str):
                    self.bad.record(
                        f"{self.name}, shard {shard}", index + 1, f"no string in column {self.opened.column!r}"
                    )
                elif text:
                    yield Document(index, text)

    def _columns(self, shard: int, start: int) -> Iterator[tuple[int, Any]]:
        """Pieces of the column from record `start` on, each with the index of its first record. What datasets gives up
        is tried again until GIVE_UP_AFTER seconds have passed without a record."""
        asked, wait = time.monotonic(), FIRST_WAIT
        while True:
            try:
                for first, column in self._read(shard, start):
                    yield first, column
                    start, asked, wait = first + len(column), time.monotonic(), FIRST_WAIT
                return
            except Exception as error:
                if self._is_damage(error):
                    self.bad.rest_of_file(f"{self.name}, shard {shard}", start, named(error))
                    return
                reason = hub_error(error, self.name) if self.opened.commit else _lost_file(self.name, error)
            if isinstance(reason, DataError) or time.monotonic() - asked + wait > GIVE_UP_AFTER:
                raise reason
            logger.warning(f"{reason}; retry in {wait:g} s from record {start:,} of shard {shard}", extra=ANY_RANK)
            time.sleep(wait)
            wait *= 2

    def _read(self, shard: int, start: int) -> Iterator[tuple[int, Any]]:
        dataset, column = self._tables, self.opened.column
        if not self.opened.is_stream:
            for first in range(start, len(dataset), ROWS_PER_READ):
                yield first, dataset[first : first + ROWS_PER_READ][column]
            return
        end = 0
        for table in dataset.shard(self.num_shards, shard).iter(ROWS_PER_READ):
            first, end = end, end + len(table)
            if end > start:
                skipped = max(start - first, 0)
                yield first + skipped, table[column].slice(skipped)

    @cached_property
    def _tables(self) -> Any:
        return self.opened.dataset.select_columns([self.opened.column]).with_format("arrow")

    def _is_damage(self, error: Exception) -> bool:
        """Whether damaged data ended the reading, not a lost network or file. When in doubt it is not: no record is
        skipped that another try would read."""
        from pyarrow import ArrowException

        kinds = (ArrowException, ValueError, TypeError, EOFError, zlib.error, lzma.LZMAError, BadGzipFile)
        is_damage = isinstance(error, kinds) or (type(error) is OSError and error.errno is None)  # of decompressors
        return is_damage and not is_of_network(error)


def _lost_file(name: str, error: Exception) -> DataError:
    return DataError(f"{name} cannot be read ({named(error)}); its files must stay in place while they are used")
