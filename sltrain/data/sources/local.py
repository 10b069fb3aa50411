"""data=local: files on this machine, one shard a file, in the order of their paths.

A file counts once, by its real path, however many links lead to it. What is wrong with whole files (a JSON array, no
UTF-8, no text under the key) is found by `check`, before anything is trained on them.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, BinaryIO

from sltrain.data.compression import split_ending
from sltrain.data.documents import BadData, DataError, Document, Source, Wanted
from sltrain.data.records import FORMATS, check_ending, read_documents
from sltrain.data.sources.base import SOURCES, SourceConfig
from sltrain.data.wrong_kind import wrong_kind

logger = logging.getLogger(__name__)

COMPARED_BYTES = 1 << 16  # at both ends of two files of one size


@SOURCES.register("local")
@dataclass
class Local(SourceConfig):
    """Options of data=local."""

    path: Any = None  # a glob or a list of globs; ** enters folders, also linked ones, each once
    text_key: str = "text"  # key of JSON objects, or column of .csv and .parquet, that holds the text
    on_bad_data: str = "skip"  # skip or stop

    def check(self) -> None:
        super().check()
        if not self.path:
            raise ValueError(
                "data=local needs path=GLOB, such as path=/data/*.json.gz (quote unusual names: 'path=\"/a/[0-9].gz\"')"
            )
        if not all(isinstance(glob, str) for glob in (self.path if isinstance(self.path, list) else [self.path])):
            raise ValueError(f"data.path={self.path}: must be a glob, or a list of them")

    def open_training(self) -> Source:
        return LocalFiles(self.path, on_bad_data=self.on_bad_data, text_key=self.text_key)


class LocalFiles:
    """The documents of files on this machine, one shard a file.

    `patterns` is a path or a glob, or a list of them; `~` and `**` are expanded. `key` is their option in messages,
    `text_key` the key or column that holds the text. Raises ValueError if a pattern matches no file or a file has an
    unknown ending.
    """

    def __init__(
        self, patterns: str | Sequence[str], on_bad_data: str = "skip", key: str = "path", text_key: str = "text"
    ) -> None:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise ValueError(f"no path given; set {key} to a file, a glob or a list of them")
        found = {path for pattern in patterns for path in _expand(pattern, key)}
        self.paths = _once_each(found)
        if num_links := len(found) - len(self.paths):
            logger.info(
                f"{key}={' '.join(patterns)}: {num_links} of {len(found)} paths lead to files that others lead to as "
                "well; each file is read once"
            )
        for path in self.paths:
            check_ending(path)
        self.text_key = text_key
        self.name = " ".join(patterns)
        self.num_shards = len(self.paths)
        self.bad = BadData(on_bad_data)

    def fingerprint(self) -> str:
        """Depends on file names and sizes; the folder may move."""
        sizes = self.shard_sizes()
        files = list(zip(map(os.path.basename, self.paths), sizes, strict=True))
        digest = sha256(repr(files).encode()).hexdigest()[:32]
        key = "" if self.text_key == "text" else f", key {self.text_key}"
        return f"{len(files)} files, {sum(sizes):,} bytes, {digest}{key}"

    def shard_sizes(self) -> list[int]:
        try:
            return [os.path.getsize(path) for path in self.paths]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    def check(self) -> None:
        for path in self.paths:
            if not os.access(path, os.R_OK):
                raise DataError(f"{path} cannot be read: it is gone or its permissions forbid it")
            if why := wrong_kind(_opener(path), path, self.text_key):
                raise DataError(f"{path}: {why}")
        for path, copy, shown_by in _copies(self.paths):
            logger.warning(f"{path} and {copy} hold the same text, by their {shown_by}; it is read twice")
        documents = (document for shard in range(self.num_shards) for document in self.documents(shard))
        if not any(document.text.strip() for document in documents):
            raise DataError(f"{self.name} holds no text: {self._why_no_text()}")

    def _why_no_text(self) -> str:
        first = self.bad.first
        if first is None:
            return "every record is blank; supply other files"
        return f"no record can be used. The first: {first}"

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        path = self.paths[shard]
        return read_documents(_opener(path), path, self.bad, start, wanted, self.text_key)


def _opener(path: str) -> Callable[[], BinaryIO]:
    return lambda: open(path, "rb")


def _expand(pattern: str, key: str) -> list[str]:
    path = os.path.expanduser(str(pattern))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        raise ValueError(
            f"{key}={pattern} is a folder; name the files in it, for example {key}={pattern.rstrip('/')}/*.json.gz"
        )
    if re.match(r"[a-z][a-z0-9+.-]*://", path):
        raise ValueError(
            f"{key}={pattern} is an address, where files of this machine are named; download it, or read a data set of "
            "the Hub with data=hf repo=OWNER/NAME"
        )
    # Brackets are those of a folder's name if nothing fits them as a class of characters.
    matches = list(_matches(path)) or list(_matches(path.replace("[", "[[]")))
    files = [match for match in matches if os.path.isfile(match)]
    _refuse_lost(set(matches).difference(files), pattern, key)
    if not files:
        raise ValueError(f"{key}={pattern} matches no file (searched from {os.getcwd()})")
    return files


def _refuse_lost(others: set[str], pattern: str, key: str) -> None:
    """Raise ValueError for what a glob matches and is no file, but should be or holds some."""
    folders = sorted(filter(os.path.isdir, others))
    for path in sorted(others.difference(folders)):
        if os.path.islink(path):
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; restore it, or remove the link"
            )
    if "**" in pattern.split(os.sep):
        return
    for path in folders:
        if split_ending(path)[0].endswith(FORMATS):
            raise ValueError(f"{path} is a folder; name the files in it, for example {key}={path}/*")
    if folders:
        logger.info(f"{key}={pattern}: folders are not entered, such as {folders[0]}; ** instead of * enters them")


def _matches(pattern: str) -> Iterator[str]:
    """The paths that a glob matches; `**` stands for any folders. It follows links to folders, but enters no folder
    twice: a folder with a link to itself would otherwise hold each file 40 times, and with two links 2^40 times."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    place = parts.index("**")
    roots = glob.glob(os.sep.join(parts[:place]) or os.sep) if place else ["."]
    entered = set[str]()
    for root in roots:
        for folder, folders, _ in os.walk(root, onerror=_refuse_folder, followlinks=True):
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")]  # as glob does
            real = os.path.realpath(folder)
            if real in entered:
                logger.info(f"{folder} leads to a folder that is searched already; not searched again")
                folders.clear()
                continue
            entered.add(real)
            yield from _matches(os.path.join(glob.escape(os.path.normpath(folder)), *(parts[place + 1 :] or ["*"])))


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}")


def _copies(paths: list[str]) -> Iterator[tuple[str, str, str]]:
    """Pairs of files with the same text, and by what it shows: a name with and without compression, or sizes,
    beginnings and ends."""
    names, contents = dict[str, str](), dict[tuple[int, bytes], str]()
    num_of_size = Counter(map(os.path.getsize, paths))
    for path in paths:
        size, name = os.path.getsize(path), path[: len(path) - len(split_ending(path)[1])]
        if (first := names.setdefault(name, path)) != path:
            yield first, path, "names"
        elif size and num_of_size[size] > 1:
            if (first := contents.setdefault((size, _ends_of(path, size)), path)) != path:
                yield first, path, "sizes, beginnings and ends"


def _ends_of(path: str, size: int) -> bytes:
    """A hash of the beginning and the end of a file."""
    with open(path, "rb") as file:
        content = file.read(COMPARED_BYTES)
        file.seek(max(size - COMPARED_BYTES, 0))
        return sha256(content + file.read(COMPARED_BYTES)).digest()


def _once_each(paths: set[str]) -> list[str]:
    """The paths in order, of those that lead to one file only the shortest."""
    by_file = {os.path.realpath(path): path for path in sorted(paths, key=lambda path: (-len(path), path))}
    return sorted(by_file.values())
