"""data=local: files on this machine, one shard a file, in the order of their paths."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sltrain.data.documents import BadData, DataError, Document, Source, Wanted
from sltrain.data.records import SUFFIXES, read_documents
from sltrain.data.sources.base import SOURCES, SourceConfig


@SOURCES.register("local")
@dataclass
class Local(SourceConfig):
    """Options of data=local."""

    path: Any = None  # a glob or a list of globs
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
        return LocalFiles(self.path, on_bad_data=self.on_bad_data)


class LocalFiles:
    """The documents of files on this machine, one shard a file.

    `patterns` is a path or a glob, or a list of them; `~` and `**` are expanded. `key` is their option in messages.
    Raises ValueError if a pattern matches no file or a file has an unknown ending.
    """

    def __init__(self, patterns: str | Sequence[str], on_bad_data: str = "skip", key: str = "path") -> None:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise ValueError(f"no path given; set {key} to a file, a glob or a list of them")
        self.paths = sorted({path for pattern in patterns for path in _expand(pattern, key)})
        for path in self.paths:
            if not path.endswith(SUFFIXES):
                raise ValueError(f"{path}: unknown ending; a text corpus is read from {' '.join(SUFFIXES)}")
        self.name = " ".join(patterns)
        self.num_shards = len(self.paths)
        self.bad = BadData(on_bad_data)

    def fingerprint(self) -> str:
        """Depends on file names and sizes; the folder may move."""
        sizes = self.shard_sizes()
        files = list(zip(map(os.path.basename, self.paths), sizes, strict=True))
        digest = sha256(repr(files).encode()).hexdigest()[:32]
        return f"{len(files)} files, {sum(sizes):,} bytes, {digest}"

    def shard_sizes(self) -> list[int]:
        try:
            return [os.path.getsize(path) for path in self.paths]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    def check(self) -> None:
        for path in self.paths:
            if not os.access(path, os.R_OK):
                raise DataError(f"{path} cannot be read: it is gone or its permissions forbid it")

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        path = self.paths[shard]
        return read_documents(lambda: open(path, "rb"), path, self.bad, start, wanted)


def _expand(pattern: str, key: str) -> list[str]:
    path = os.path.expanduser(str(pattern))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        raise ValueError(
            f"{key}={pattern} is a folder; name the files in it, for example {key}={pattern.rstrip('/')}/*.json.gz"
        )
    files = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    if not files:
        raise ValueError(f"{key}={pattern} matches no file (searched from {os.getcwd()})")
    return files
