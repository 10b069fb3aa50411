"""What all sources of text share: the document, the protocol, the errors and the rule for damaged data.

A corpus is a fixed list of shards (files), a shard a fixed list of records. A document is named by (shard, record
index), whatever is damaged or skipped around it, so a position in the corpus means the same in every process and
after every restart.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from sltrain.log import ANY_RANK

logger = logging.getLogger(__name__)

Wanted = Callable[[int], bool]  # record index -> whether the reader asks for that record

WARNINGS_PER_FILE = 3  # bad records of one file that are reported one by one
COUNTS_TOLD = (100, 1_000, 10_000, 100_000)  # after so many bad records of one file, their number is


class DataError(ValueError):
    """The corpus cannot supply what was requested; the message says what to change."""


class NetworkError(ConnectionError):
    """The corpus cannot be reached, or the connection was lost. A run may save and continue later."""


@dataclass(slots=True)
class Document:
    """One text and the index of its record in its shard."""

    index: int
    text: str


class Source(Protocol):
    """A corpus. Messages call it by its `name`.

    A source that has to prepare a shard, such as to download it, may define `expect(shard)`: the shard will be read
    soon. It returns at once and raises nothing.
    """

    name: str
    num_shards: int

    def fingerprint(self) -> str:
        """Words and a hash that identify the corpus: equal fingerprints, same documents in the same order."""
        ...

    def shard_sizes(self) -> list[int]:
        """The amount of text in each shard, in any common unit."""
        ...

    def check(self) -> None:
        """Raise DataError or NetworkError now if reading the first document would."""
        ...

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        """The documents of a shard with index >= start and wanted(index), in order; all from `start` on without
        `wanted`. Other records are not parsed where the format allows it."""
        ...


def is_held_out(text: str, every: int) -> bool:
    """Whether a document is held out of training: one in `every`, by a hash of its text (0: none).

    The text decides, not the position, so a duplicate of a held-out document is held out too.
    """
    return every > 0 and int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) % every == 0


class BadData:
    """What happens to damaged data: `skip` skips it and warns once, however often it is read; `stop` raises
    DataError.

    Raises ValueError for another mode.
    """

    def __init__(self, mode: str) -> None:
        if mode not in ("skip", "stop"):
            raise ValueError(f"on_bad_data is {mode!r}; it must be skip or stop")
        self.mode = mode
        self.first: str | None = None  # what was wrong first, and where
        self._lines: dict[str, set[int]] = {}  # file -> those of its bad records, at most so many as are told
        self._damaged_files: set[str] = set()

    def record(self, file: str, line: int, why: str) -> None:
        """Handle a record (1-based line, row or paragraph of `file`) that cannot be used."""
        self.first = self.first or f"{file}:{line}: {why}"
        if self.mode == "stop":
            raise DataError(f"{file}:{line}: {why}; fix it, or set on_bad_data=skip to skip bad records")
        lines = self._lines.setdefault(file, set())
        if line in lines or len(lines) == COUNTS_TOLD[-1]:
            return
        lines.add(line)
        if len(lines) <= WARNINGS_PER_FILE:
            more = "; of further ones in this file only their number is told" * (len(lines) == WARNINGS_PER_FILE)
            logger.warning(f"{file}:{line}: {why}; record skipped{more}", extra=ANY_RANK)
        elif len(lines) in COUNTS_TOLD:
            logger.warning(f"{file}: {len(lines):,} records skipped so far", extra=ANY_RANK)

    def rest_of_file(self, file: str, last_good: int, why: str) -> None:
        """Handle a `file` that cannot be read past its first `last_good` records."""
        damage = f"{file} is damaged {f'after its record {last_good}' if last_good else 'at its beginning'} ({why})"
        self.first = self.first or damage
        if self.mode == "stop":
            raise DataError(f"{damage}; replace it, or set on_bad_data=skip to skip the rest of the file")
        if file not in self._damaged_files:
            self._damaged_files.add(file)
            logger.warning(f"{damage}; rest of the file skipped", extra=ANY_RANK)
