"""File formats: an open file -> documents, with rules for damaged records and damaged compression.

| file                                     | a record is                                                         |
|------------------------------------------|---------------------------------------------------------------------|
| .jsonl .json, also .gz (C4's format)     | a line holding a JSON object with a string `text`                   |
| .txt, also .gz                           | a paragraph: lines up to a blank one, or up to 64 kB                |
| .parquet                                 | a row with a string column `text`                                   |

Record indices count lines, paragraphs or rows from the beginning of the file, unusable ones included. Lines that are
not requested are decompressed but not parsed: that runs at about 80,000 documents of 2 kB a second. A damaged gzip
member cannot be resynchronised, so the rest of such a file is lost; gzip notices either by its structure or by the
checksum at the end.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

from sltrain.data.documents import BadData, DataError, Document, NetworkError, Wanted

PARAGRAPH_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", *PARAGRAPH_SUFFIXES, ".parquet")
MAX_PARAGRAPH_BYTES = 1 << 16
ROWS_PER_READ = 512

Record = tuple[int, Callable[[], str | None]]  # 1-based line or row, and a function that returns its text


def read_documents(
    opener: Callable[[], BinaryIO], file: str, bad: BadData, start: int = 0, wanted: Wanted | None = None
) -> Iterator[Document]:
    """The documents of one file with record index >= start and wanted(index), if it is given.

    `opener` opens the raw bytes; `file` is the name in messages, and its ending decides the format. Raises DataError
    for a file that is missing or forbidden, and for damaged data if `bad` says so; NetworkError if `opener` does.
    """
    last_good = 0  # 1-based, of the records requested
    try:
        with opener() as raw:
            for index, (line, parse) in enumerate(_records(raw, file)):
                if index >= start and (wanted is None or wanted(index)):
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
        raise DataError(f"{file} cannot be read: its permissions forbid it") from None
    except FileNotFoundError:
        raise DataError(f"{file} is gone; the files of a corpus must stay in place while it is used") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are OSError and ValueError
        bad.rest_of_file(file, last_good, _one_line(error))


def _records(raw: BinaryIO, file: str) -> Iterator[Record]:
    if file.endswith(".parquet"):
        yield from _rows(raw)
        return
    lines = gzip.open(raw) if file.endswith(".gz") else raw
    if file.endswith(PARAGRAPH_SUFFIXES):
        yield from _paragraphs(lines)
        return
    for number, text in enumerate(lines, 1):
        yield number, partial(_text_of_json, text)


def _text_of_json(line: bytes) -> str | None:
    """The text of a JSON line; None for a blank line. Raises ValueError for anything else."""
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


def _paragraphs(lines: "BinaryIO | gzip.GzipFile") -> Iterator[Record]:
    """Paragraphs, each with the number of its first line; long ones are cut at line ends."""
    first, size, parts = 1, 0, list[bytes]()
    for number, line in enumerate(lines, 1):
        is_blank = not line.strip()
        if parts and (is_blank or size + len(line) > MAX_PARAGRAPH_BYTES):
            yield first, b"".join(parts).decode
            parts, size = [], 0
        if not is_blank:
            first = first if parts else number
            parts.append(line)
            size += len(line)
    if parts:
        yield first, b"".join(parts).decode


def _rows(raw: BinaryIO) -> Iterator[Record]:
    from pyarrow import parquet  # costs 0.1 s and is needed for this format only

    table = parquet.ParquetFile(raw)
    if "text" not in table.schema_arrow.names:
        raise ValueError(f"it has no column 'text' but {', '.join(table.schema_arrow.names)}")
    batches = table.iter_batches(batch_size=ROWS_PER_READ, columns=["text"])
    texts = (text for batch in batches for text in batch.column(0).to_pylist())
    for number, text in enumerate(texts, 1):
        yield number, partial(_valid_text, text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
