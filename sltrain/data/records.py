"""File formats: an open file -> documents, damaged records and damaged compression included.

| file                                     | a record is                                                         |
|------------------------------------------|---------------------------------------------------------------------|
| .jsonl .json, also .gz (C4's format)     | a line holding a JSON object with a string `text`                   |
| .txt, also .gz                           | a paragraph: lines up to a blank one, or up to 64 kB                |
| .parquet                                 | a row with a string column `text`                                   |

Record indices count lines, paragraphs or rows from the beginning of the file, unusable ones included. Lines that are
not asked for are decompressed but not parsed: that runs at about 80,000 documents of 2 kB a second. A damaged gzip
member cannot be resynchronised, so the rest of such a file is lost; gzip notices either by its structure or by the
checksum at the end.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from sltrain.data.documents import BadData, DataError, Document, NetworkError

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARAGRAPH_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*LINE_SUFFIXES, *PARAGRAPH_SUFFIXES, ".parquet")
MAX_PARAGRAPH_BYTES = 1 << 16
ROWS_PER_READ = 512

Opener = Callable[[], BinaryIO]


def read_documents(
    opener: Opener, file: str, bad: BadData, start: int = 0, step: int = 1, offset: int = 0
) -> Iterator[Document]:
    """Yield the documents of one file with record index >= start and index % step == offset.

    `opener` opens the raw bytes; `file` is the name in messages and its ending decides the format.
    """
    last_good = 0  # 1-based, of the records asked for
    try:
        with opener() as raw:
            for index, line, parse in _records(raw, file):
                if index >= start and index % step == offset:
                    try:
                        text = parse()
                    except (ValueError, TypeError) as error:
                        bad.record(file, line, str(error))
                    else:
                        last_good = index + 1
                        if text:
                            yield Document(index, text)
    except (NetworkError, DataError):
        raise
    except PermissionError:
        raise DataError(f"{file} may not be read: its permissions forbid it") from None
    except FileNotFoundError:
        raise DataError(f"{file} is gone; the files of a corpus must stay in place while it is used") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are OSError and ValueError
        bad.rest_of_file(file, last_good, _one_line(error))


def _records(raw: BinaryIO, file: str) -> Iterator[tuple[int, int, Callable[[], str | None]]]:
    """Yield (record index, 1-based line or row, a function that parses it) for every record of a file."""
    if file.endswith(".parquet"):
        yield from _rows(raw)
        return
    lines = gzip.open(raw) if file.endswith(".gz") else raw
    if file.endswith(PARAGRAPH_SUFFIXES):
        for index, (line, paragraph) in enumerate(_paragraphs(lines)):
            yield index, line, paragraph.decode
        return
    for index, text in enumerate(lines):
        yield index, index + 1, lambda text=text: _text_of_json(text)  # type: ignore[misc]


def _text_of_json(line: bytes) -> str | None:
    """The text of a JSON line; None for a blank line; ValueError in words for anything else."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # brackets can be nested deeper than Python's stack
        raise ValueError(f"not valid JSON ({_one_line(error)})") from None
    return _valid_text(record.get("text") if isinstance(record, dict) else None)


def _valid_text(text: object) -> str:
    if not isinstance(text, str):
        raise ValueError("no string under the key 'text'")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise ValueError("text is not valid Unicode") from None
    return text


def _paragraphs(lines: "BinaryIO | gzip.GzipFile") -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line of its first line, bytes) of each paragraph, long ones cut at line ends."""
    first, size, parts = 1, 0, list[bytes]()
    for number, line in enumerate(lines, 1):
        is_blank = not line.strip()
        if parts and (is_blank or size + len(line) > MAX_PARAGRAPH_BYTES):
            yield first, b"".join(parts)
            parts, size = [], 0
        if not is_blank:
            first = first if parts else number
            parts.append(line)
            size += len(line)
    if parts:
        yield first, b"".join(parts)


def _rows(raw: BinaryIO) -> Iterator[tuple[int, int, Callable[[], str | None]]]:
    from pyarrow import parquet  # costs 0.1 s and is needed for this format only

    table = parquet.ParquetFile(raw)
    if "text" not in table.schema_arrow.names:
        raise ValueError(f"it has no column 'text' but {', '.join(table.schema_arrow.names)}")
    index = 0
    for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=["text"]):
        for text in batch.column(0).to_pylist():
            yield index, index + 1, lambda text=text: _valid_text(text)  # type: ignore[misc]
            index += 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
