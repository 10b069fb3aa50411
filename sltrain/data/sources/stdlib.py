"""data=stdlib: the source code of the running Python's standard library, 10 to 30 MB of real text on every machine."""

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sltrain.data.documents import DataError, Document, Source
from sltrain.data.sources.base import SOURCES, SourceConfig

CODE_SHARDS = 16
CODE_DOCUMENT_CHARS = (
    4096  # about 1,000 tokens: long enough to read, short enough that shuffling and the held-out part are meaningful
)
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@SOURCES.register("stdlib")
@dataclass
class StdLib(SourceConfig):
    """data=stdlib has no options of its own."""

    def open_training(self) -> Source:
        return StandardLibrary()


class StandardLibrary:
    """Files of the library as documents.

    Tests and installed packages are left out. Files are cut at line ends into documents of about 4 kB and dealt to 16
    shards. Everything is read once (0.3 s) and kept in memory. The fingerprint covers the content, because every
    Python release has another library.
    """

    name = "the Python standard library"

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or sysconfig.get_path("stdlib"))
        self._shards: list[list[str]] = [[] for _ in range(CODE_SHARDS)]
        content = sha256()
        num_files = 0
        for path in _python_files(self.root):
            try:
                with tokenize.open(path) as file:  # decodes as the file's own coding line says
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue  # a few files of the library are deliberately broken
            content.update(f"{path.relative_to(self.root).as_posix()}\n{len(text)}\n".encode() + text.encode())
            self._shards[num_files % CODE_SHARDS].extend(_cut_at_lines(text, CODE_DOCUMENT_CHARS))
            num_files += 1
        if num_files == 0:
            raise DataError(f"no Python source files under {self.root}; use data=local path=GLOB with text of your own")
        self._shards = [shard for shard in self._shards if shard]
        self.num_shards = len(self._shards)
        self._fingerprint = f"Python {platform.python_version()}, {num_files} files, {content.hexdigest()[:32]}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def shard_name(self, shard: int) -> str:
        return f"part {shard + 1} of {self.num_shards} of {self.root}"

    def shard_sizes(self) -> list[int]:
        return [sum(map(len, texts)) for texts in self._shards]

    def check(self) -> None:
        """Everything was read on construction."""

    def documents(self, shard: int, start: int = 0, step: int = 1, offset: int = 0) -> Iterator[Document]:
        first = start + (offset - start) % step
        texts = self._shards[shard]
        return (Document(index, texts[index]) for index in range(first, len(texts), step))


def _python_files(root: Path) -> Iterator[Path]:
    """The library's own .py files in an order that does not depend on the file system."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _cut_at_lines(text: str, limit: int) -> Iterator[str]:
    """Pieces of about `limit` characters that end at line ends and join to the text; pieces of white space are left
    out."""
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
