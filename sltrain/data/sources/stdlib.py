"""data=stdlib: the source code of the running Python's standard library, 10 to 30 MB of real text on every machine."""

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sltrain.data.documents import DataError, Document, Source, Wanted
from sltrain.data.sources.base import SOURCES, SourceConfig

NUM_SHARDS = 16
DOCUMENT_CHARS = 4096  # about 1,000 tokens: long enough to learn from, short enough for shuffling and holding out
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@SOURCES.register("stdlib")
@dataclass
class StdLib(SourceConfig):
    """data=stdlib has no options of its own."""

    def open_training(self) -> Source:
        return StandardLibrary()


class StandardLibrary:
    """The library's files, without tests and installed packages, as documents.

    Files are cut at line ends into documents of about 4 kB and dealt to 16 shards. Everything is read once (0.3 s)
    and kept in memory. The fingerprint covers the content, because every Python release has another library. Raises
    DataError if there are no source files.
    """

    name = "the Python standard library"

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or sysconfig.get_path("stdlib"))
        shards: list[list[str]] = [[] for _ in range(NUM_SHARDS)]
        content = sha256()
        num_files = 0
        for path in _python_files(self.root):
            try:
                with tokenize.open(path) as file:  # decodes by the file's coding line
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue  # a few files of the library are deliberately broken
            content.update(f"{path.relative_to(self.root).as_posix()}\n{len(text)}\n".encode() + text.encode())
            shards[num_files % NUM_SHARDS].extend(_cut_at_lines(text, DOCUMENT_CHARS))
            num_files += 1
        if num_files == 0:
            raise DataError(f"no Python source files under {self.root}; use data=local path=GLOB")
        self._shards = [shard for shard in shards if shard]
        self.num_shards = len(self._shards)
        self._fingerprint = f"Python {platform.python_version()}, {num_files} files, {content.hexdigest()[:32]}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def shard_sizes(self) -> list[int]:
        return [sum(map(len, texts)) for texts in self._shards]

    def check(self) -> None:
        """Nothing to check: everything has been read."""

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        texts = self._shards[shard]
        indices = range(start, len(texts))
        return (Document(index, texts[index]) for index in (indices if wanted is None else filter(wanted, indices)))


def _python_files(root: Path) -> Iterator[Path]:
    """The library's own .py files in an order that does not depend on the file system."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _cut_at_lines(text: str, limit: int) -> Iterator[str]:
    """The text in pieces of about `limit` characters that end at line ends, without a last piece of white space."""
    parts, size = list[str](), 0
    for line in text.splitlines(keepends=True):
        if parts and size + len(line) > limit:
            yield "".join(parts)
            parts, size = [], 0
        parts.append(line)
        size += len(line)
    rest = "".join(parts)
    if rest.strip():
        yield rest
