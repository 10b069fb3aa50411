"""What every source of text has in common: the document, the protocol, the errors and the rule for damaged data.

A corpus is a fixed list of shards (files), a shard a fixed list of records. A document is named by (shard, record
index), whatever is damaged or left out around it, so that a position in the corpus means the same in every process
and after every restart.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from sltrain.log import ANY_RANK

logger = logging.getLogger(__name__)

REPORTED_PER_FILE = 3  # bad records of one file that are named one by one; the others are only counted


class DataError(ValueError):
    """The corpus cannot give what is asked of it; the message says what to change."""


class NetworkError(ConnectionError):
    """The corpus could not be reached, or was lost on the way. A run may save and be continued later."""


@dataclass(slots=True)
class Document:
    """One text and the index of its record in its shard."""

    index: int
    text: str


class Source(Protocol):
    """A corpus. `name` is what messages call it."""

    name: str
    num_shards: int

    def fingerprint(self) -> str:
        """Identity of the corpus in words and a hash; two corpora with equal fingerprints have the same documents in
        the same order."""
        ...

    def shard_name(self, shard: int) -> str:
        """What messages call this shard."""
        ...

    def shard_sizes(self) -> list[int]:
        """How much text each shard holds, in any unit that they share."""
        ...

    def check(self) -> None:
        """Raise now (DataError, NetworkError) what would otherwise end the run at its first document."""
        ...

    def documents(self, shard: int, start: int = 0, step: int = 1, offset: int = 0) -> Iterator[Document]:
        """Yield the documents of a shard in order, those with index >= start and index % step == offset.

        Records that are not asked for are not parsed where the format allows it.
        """
        ...


def is_held_out(text: str, every: int) -> bool:
    """Whether a document belongs to the held-out part: one in `every`, by a hash of its text (0: none).

    The text decides, not the position, so a duplicate of a held-out document is held out too.
    """
    return every > 0 and int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) % every == 0


class BadData:
    """The rule for damaged data: `skip` leaves it out, says so once and counts; `stop` raises DataError.

    `records` counts the records left out, `files` the files whose rest was left out; each once, however often it is
    met.
    """

    def __init__(self, mode: str) -> None:
        if mode not in ("skip", "stop"):
            raise ValueError(f"on_bad_data is {mode!r}; it must be skip or stop")
        self.mode = mode
        self._seen: set[tuple[str, int]] = set()
        self._records_of_file: dict[str, int] = {}
        self.files = 0

    @property
    def records(self) -> int:
        return sum(self._records_of_file.values())

    def record(self, file: str, line: int, why: str) -> None:
        """A record (1-based line, row or paragraph of `file`) cannot be used."""
        if self.mode == "stop":
            raise DataError(f"{file}:{line}: {why}; mend it, or set on_bad_data=skip to leave such records out")
        if (file, line) in self._seen:
            return
        self._seen.add((file, line))
        count = self._records_of_file[file] = self._records_of_file.get(file, 0) + 1
        if count <= REPORTED_PER_FILE:
            more = "; further ones of this file are left out without a line" if count == REPORTED_PER_FILE else ""
            logger.warning(f"{file}:{line}: {why}; this record is left out{more}", extra=ANY_RANK)

    def rest_of_file(self, file: str, last_good: int, why: str) -> None:
        """`file` cannot be read behind its `last_good` records (0: none could be read)."""
        where = f"after its record {last_good}" if last_good else "at its very beginning"
        if self.mode == "stop":
            raise DataError(
                f"{file} is damaged {where} ({why}); replace it, or set on_bad_data=skip to leave its rest out"
            )
        if (file, 0) in self._seen:
            return
        self._seen.add((file, 0))
        self.files += 1
        logger.warning(f"{file} is damaged {where} ({why}); the rest of the file is left out", extra=ANY_RANK)
