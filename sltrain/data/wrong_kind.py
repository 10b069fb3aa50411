"""Whole files of another kind than their names say, found before training and put into words with a cure.

They are mistakes, not damage: skipped like damaged records they would take their text from a run without a word. The
first bytes show most of them (an archive, a web page, a JSON array, UTF-16), the first records the others (text under
another key than in the other files). Damage is left to reading, which handles it as on_bad_data says.
"""

import csv
import re
from collections.abc import Callable
from itertools import islice
from typing import BinaryIO

from sltrain.data.compression import DAMAGE, MAGIC, decompressed, split_ending
from sltrain.data.records import BYTE_ORDER_MARK, WrongKey, records_of

HEAD_BYTES = 512  # enough to see what kind of file it is
RECORDS_TRIED = 100  # of a file, until one holds text
TAR_MARK = slice(257, 262)  # where a tar archive says what it is
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame without text, with which a .zst file may begin

Opener = Callable[[], BinaryIO]


def wrong_kind(opener: Opener, file: str, text_key: str = "text") -> str | None:
    """What is wrong with a whole file and how to cure it; None: nothing that its beginning shows.

    `opener` opens the raw bytes; `file` is the name in messages, and its ending decides the format. `text_key` is the
    key or column that holds the text.
    """
    stem, compression = split_ending(file)
    with opener() as raw:
        head = raw.read(HEAD_BYTES)
    why = _wrong_container(head, file, stem, compression)
    if why or stem.endswith(".parquet"):
        return why or _wrong_records(opener, file, text_key)
    if compression:
        try:
            with opener() as raw, decompressed(raw, compression) as inside:
                head = inside.read(HEAD_BYTES)
        except DAMAGE as error:
            if compression == ".zst" and "too much memory" in str(error):
                return (
                    "it was compressed over a longer distance than is read here; compress it again: "
                    f"zstd -d --long=31 -c FILE | zstd -o NEW_FILE{compression}"
                )
            return None  # reading reports where it is damaged
    return _wrong_text(head, stem) or _wrong_records(opener, file, text_key)


def _wrong_container(head: bytes, file: str, stem: str, compression: str) -> str | None:
    """What the first bytes of the file itself say against its name."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the data; run `git lfs pull` where it comes from"
    if head.startswith(b"PK\x03\x04"):
        return "it is a zip archive; unpack it"
    kind = next((ending for ending, magic in MAGIC.items() if head.startswith(magic)), "")
    plain_name = file[: len(file) - len(compression)]
    if kind and kind != compression:
        return f"it is compressed, but its name does not end with {kind}; rename it to {plain_name}{kind}"
    if head.startswith(b"PAR1") and not stem.endswith(".parquet"):
        return "it is a parquet file; give it the ending .parquet"
    is_frame = compression == ".zst" and SKIPPABLE.match(head)
    if compression and head and not kind and not is_frame and _is_text(head):
        return _web_page(head) or f"it is not compressed; rename it to {plain_name}"
    return None


def _wrong_text(head: bytes, stem: str) -> str | None:
    """What the first bytes of the content say against its being text of the format."""
    if head[TAR_MARK] == b"ustar":
        return "it is a tar archive; unpack it: tar -xf FILE"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or re.match(rb"([^\0]\0|\0[^\0]){8}", head):
        return "it is not UTF-8 but UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
    if b"\0" in head:
        return r"it holds zero bytes, as binary and damaged files do; replace it, or: tr -d '\0' < FILE > NEW_FILE"
    if stem.endswith((".json", ".jsonl")):
        head = head.removeprefix(BYTE_ORDER_MARK).lstrip()
        if head.startswith(b"["):
            return (
                "it is a JSON array, where each line must be an object; convert it: jq -c '.[]' FILE > NEW_FILE.jsonl"
            )
        if re.match(rb"\{\s*?\n", head):
            return "its JSON objects go over several lines; write each on one line: jq -c . FILE > NEW_FILE.jsonl"
        return _web_page(head)
    return None


def _web_page(head: bytes) -> str | None:
    if head.lstrip().startswith(b"<"):
        return "it is HTML or XML, such as the page of an error or a login; download the data again"
    return None


def _is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 without zeros, but for a character that is cut at the end."""
    return b"\0" not in head and "\ufffd" not in head.decode(errors="replace")[:-1]


def _wrong_records(opener: Opener, file: str, text_key: str) -> str | None:
    """Why none of the first records holds text under the key; None if one does, and for records that are damaged."""
    first = None
    try:
        with opener() as raw:
            for _, text_of in islice(records_of(raw, file, text_key), RECORDS_TRIED):
                try:
                    if text_of() is not None:
                        return None
                except WrongKey as error:
                    first = first or str(error)
    except WrongKey as error:
        first = str(error)
    except (*DAMAGE, ValueError, TypeError, csv.Error):
        return None
    return first and f"{first}; set data.text_key to the one that holds the text, or leave this file out"
