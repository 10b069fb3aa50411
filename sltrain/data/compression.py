"""Compressed files, by their ending: .gz .bz2 .xz .zst -> the bytes inside, read from front to back.

A file may have several members (`cat a.gz b.gz`; what parallel compressors write); their contents are joined. Damage
shows as OSError, EOFError, zlib.error or lzma.LZMAError while the bytes are read. A damaged member cannot be
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


class _Members(io.RawIOBase):
    """The contents of all members of a .bz2 or .xz file. The readers of Python's own library take what follows a member
    and is none for the end of the file, so that a damaged header, or the zeros that the .xz format allows between
    members, would end the text without a word."""

    def __init__(self, raw: BinaryIO, new_member: Callable[[], Any]) -> None:
        self._raw, self._new_member, self._member = raw, new_member, new_member()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            compressed = b""
            if self._member.eof:
                compressed = self._after_member()
                if not compressed:
                    return 0
                self._member = self._new_member()
            elif self._member.needs_input:
                compressed = self._raw.read(BUFFER_BYTES)
                if not compressed:
                    raise EOFError("the file ends in the middle")
            data = self._member.decompress(compressed, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _after_member(self) -> bytes:
        """What follows the member that has ended, without zeros; b"" at the end of the file."""
        rest = self._member.unused_data.lstrip(b"\0")
        while not rest:
            more = self._raw.read(BUFFER_BYTES)
            if not more:
                return b""
            rest = more.lstrip(b"\0")
        return cast(bytes, rest)


def _open_bzip2(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Members(raw, bz2.BZ2Decompressor), BUFFER_BYTES))


def _open_xz(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Members(raw, lzma.LZMADecompressor), BUFFER_BYTES))


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    import pyarrow  # costs 0.1 s and is needed for this format only

    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream, BUFFER_BYTES))


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": _open_bzip2,
    ".xz": _open_xz,
    ".zst": _open_zstd,
}
MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}  # how such files begin


def split_ending(name: str) -> tuple[str, str]:
    """A file's name -> the name in small letters without the ending of its compression, and that ending ("": not
    compressed)."""
    name = name.lower()
    ending = next((ending for ending in OPENERS if name.endswith(ending)), "")
    return name.removesuffix(ending), ending


def decompressed(raw: BinaryIO, ending: str) -> BinaryIO:
    """The bytes inside an open file whose name has that ending. Raises EOFError for an empty file that should be
    compressed: what is lost is no less than of one that ends in the middle."""
    if not ending:
        return raw
    if not raw.read(1):
        raise EOFError("the file is empty")
    raw.seek(0)
    return cast(BinaryIO, OPENERS[ending](raw))
