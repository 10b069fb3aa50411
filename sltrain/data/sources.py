"""Where documents come from: local files, the Python standard library, the Hugging Face Hub (hub.py).

This is the face of the room: a source, its errors and its protocol are imported from here. All sources read the same
file formats (records.py) and differ only in how a shard is opened.
"""

import glob
import os
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from sltrain.data.documents import BadData, DataError, Document, NetworkError, Source, is_held_out
from sltrain.data.hub import HubFiles, RetryPolicy
from sltrain.data.records import SUFFIXES, read_documents

__all__ = [
    "BadData",
    "DataError",
    "Document",
    "HubFiles",
    "LocalFiles",
    "NetworkError",
    "RetryPolicy",
    "Source",
    "StandardLibrary",
    "is_held_out",
]

CODE_SHARDS = 16
CODE_DOCUMENT_CHARS = (
    4096  # about 1,000 tokens: long enough to read, short enough that shuffling and the held-out part are meaningful
)
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class LocalFiles:
    """Files on this machine, one shard a file, in the order of their paths.

    `patterns` is a path or a glob, or a list of them; `~` and `**` are expanded. `key` is what the user typed them
    after. Raises ValueError if a pattern matches no file or a file has an unknown ending.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        on_bad_data: str = "skip",
        report: Callable[[str], None] = print,
        key: str = "path",
    ) -> None:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise ValueError(f"no path given; set {key} to a file, a glob or a list of them")
        self.paths = sorted({path for pattern in patterns for path in _expand(pattern, key)})
        for path in self.paths:
            if not path.endswith(SUFFIXES):
                raise ValueError(f"{path}: unknown ending; a text corpus is read from {' '.join(SUFFIXES)}")
        self.name = " ".join(patterns)
        self.num_shards = len(self.paths)
        self.bad = BadData(on_bad_data, report)

    def fingerprint(self) -> str:
        """File names and sizes; the folder may move."""
        sizes = self.shard_sizes()
        files = list(zip(map(os.path.basename, self.paths), sizes, strict=True))
        return f"{len(files)} files, {sum(sizes):,} bytes, {_digest(repr(files))}"

    def shard_sizes(self) -> list[int]:
        try:
            return [os.path.getsize(path) for path in self.paths]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    def shard_name(self, shard: int) -> str:
        return self.paths[shard]

    def check(self) -> None:
        for path in self.paths:
            if not os.access(path, os.R_OK):
                raise DataError(f"{path} may not be read: it is gone or its permissions forbid it")

    def documents(self, shard: int, start: int = 0, step: int = 1, offset: int = 0) -> Iterator[Document]:
        path = self.paths[shard]
        return read_documents(lambda: open(path, "rb"), path, self.bad, start, step, offset)


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


class StandardLibrary:
    """The source code of the running Python's standard library: 10 to 30 MB of real text on every machine.

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


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]
