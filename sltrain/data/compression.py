"""Compressed files, by their ending: .gz .bz2 .xz .zst -> the bytes inside, read from front to back.

Damage shows as OSError, EOFError, zlib.error or lzma.LZMAError while the bytes are read. A damaged member cannot be
resynchronised, so everything after it is lost.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
BUFFER_BYTES = 1 << 16


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    import pyarrow  # costs 0.1 s and is needed for this format only

    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream, BUFFER_BYTES))


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}  # how such files begin


def split_ending(name: str) -> tuple[str, str]:
    """A file's name -> the name without the ending of its compression, and that ending ("": not compressed)."""
    ending = next((ending for ending in OPENERS if name.endswith(ending)), "")
    return name.removesuffix(ending), ending


def decompressed(raw: BinaryIO, ending: str) -> BinaryIO:
    """The bytes inside an open file whose name has that ending."""
    return cast(BinaryIO, OPENERS[ending](raw)) if ending else raw
