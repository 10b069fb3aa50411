"""File formats: an open file -> documents, with rules for damaged records and damaged compression.

| file           | a record is                                                                                    |
|----------------|------------------------------------------------------------------------------------------------|
| .jsonl .json   | a line holding a JSON object with a string under the text key (C4: `text`)                     |
| .txt           | a paragraph: lines up to a blank one, or up to 64 kB                                           |
| .csv           | a row, after a first row with the names of the columns, between commas, semicolons or tabs     |
| .parquet       | a row with a string column of that name                                                        |

All but .parquet may be compressed: .gz .bz2 .xz .zst after the ending (compression.py). Capital letters in endings do
not matter. Record indices count lines, paragraphs or rows from the beginning of the file, unusable ones included. Lines
that are not requested are decompressed but not parsed: that runs at about 80,000 documents of 2 kB a second. The rest
of a file after damaged compression is lost; gzip notices damage by its structure or by the checksum at the end.

A read that the operating system refuses (a failing disk, a network file system that is away) is no damage: the text is
there. It is tried again, and then ends the reading, so that a run saves and goes on later without having lost text.

A file of another kind than its ending says is no damage but a mistake, see wrong_kind.py.
"""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import BinaryIO

from sltrain.data.compression import DAMAGE, OPENERS, decompressed, split_ending
from sltrain.data.documents import BadData, DataError, Document, NetworkError, Wanted
from sltrain.log import one_line

FORMATS = (".jsonl", ".json", ".txt", ".csv", ".parquet")
PLAIN_FORMATS = FORMATS[:-1]  # those that may be compressed; parquet has its own compression
MAX_PARAGRAPH_BYTES = 1 << 16
ROWS_PER_READ = 512
RETRY_SECONDS = (0.1, 1.0, 5.0)  # between the tries of a read that the operating system refuses
SEPARATORS = ",;\t"  # of the columns of a .csv file; the names of the columns decide
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # how some editors begin a file in UTF-8
MAX_KEYS = 8  # keys of a record that a message names

Record = tuple[int, Callable[[], str | None]]  # 1-based line or row, and a function that returns its text


class WrongKey(ValueError):
    """A record, or a whole table, that holds no text where it is looked for."""


csv.field_size_limit((1 << 31) - 1)  # a document may be longer than the module's limit of 128 kB


def check_ending(path: str) -> None:
    """Raise ValueError for a file whose name has no ending of a format."""
    stem, compression = split_ending(path)
    if not stem.endswith(PLAIN_FORMATS if compression else FORMATS):
        raise ValueError(
            f"{path}: unknown ending; a text corpus is read from {' '.join(FORMATS)}, and from all but .parquet with "
            f"{' '.join(OPENERS)} after that"
        )


def read_documents(
    opener: Callable[[], BinaryIO],
    file: str,
    bad: BadData,
    start: int = 0,
    wanted: Wanted | None = None,
    text_key: str = "text",
) -> Iterator[Document]:
    """The documents of one file with record index >= start and wanted(index), if it is given.

    `opener` opens the raw bytes; `file` is the name in messages, and its ending decides the format. `text_key` is the
    key or column that holds the text. Raises DataError for a file that is missing or forbidden, and for damaged data if
    `bad` says so; NetworkError if `opener` does, and where the operating system goes on refusing to read.
    """
    num_failed = 0  # tries of the record at `start`
    while True:
        try:
            for document in _read_once(opener, file, bad, start, wanted, text_key):
                start, num_failed = document.index + 1, 0
                yield document
            return
        except _Refused as refused:
            if num_failed == len(RETRY_SECONDS):
                why = os.strerror(refused.errno)
                raise NetworkError(f"{file} cannot be read after its record {start}: {why}") from refused
            time.sleep(RETRY_SECONDS[num_failed])
            num_failed += 1


class _Refused(Exception):
    """The operating system did not read from a file that is there."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


def _read_once(
    opener: Callable[[], BinaryIO], file: str, bad: BadData, start: int, wanted: Wanted | None, text_key: str
) -> Iterator[Document]:
    """`read_documents` without another try: raises _Refused."""
    last_good = 0  # 1-based, of the records requested
    try:
        with opener() as raw:
            for index, (line, parse) in enumerate(records_of(raw, file, text_key)):
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
    except (*DAMAGE, ValueError, csv.Error) as error:  # pyarrow's errors are OSError and ValueError
        if isinstance(error, OSError) and error.errno is not None:  # decompressors' and pyarrow's own have none
            raise _Refused(error.errno) from error
        bad.rest_of_file(file, last_good, one_line(error))


def records_of(raw: BinaryIO, file: str, text_key: str) -> Iterator[Record]:
    """The records of an open file by the rules of its ending. Damage raises what `read_documents` handles, when a
    record or its text is asked for; WrongKey: there is no text under `text_key`."""
    stem, compression = split_ending(file)
    if stem.endswith(".parquet"):
        yield from _rows(raw, text_key)
        return
    lines = decompressed(raw, compression)
    if stem.endswith(".txt"):
        yield from _paragraphs(lines)
    elif stem.endswith(".csv"):
        yield from _csv_rows(lines, text_key)
    else:
        for number, text in enumerate(lines, 1):
            yield number, partial(_text_of_json, text, text_key)


def _text_of_json(line: bytes, text_key: str) -> str | None:
    """The text of a JSON line; None for a blank line. Raises ValueError for anything else."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # brackets can be nested deeper than Python's stack
        raise ValueError(f"not valid JSON ({one_line(error)})") from None
    if not isinstance(record, dict):
        raise WrongKey(f"not a JSON object with the key {text_key!r}")
    text = record.get(text_key)
    if isinstance(text, str):
        return _valid_text(text)
    if text_key in record:
        raise (ValueError if text is None else WrongKey)(f"no string but {_in_words(text)} under the key {text_key!r}")
    raise WrongKey(f"no string under the key {text_key!r}{_strings_of(record)}")


def _in_words(value: object) -> str:
    """What kind of JSON value it is."""
    kinds = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _strings_of(record: Mapping[str, object]) -> str:
    """The keys of a record that hold strings, in words."""
    names = [key for key, value in record.items() if isinstance(value, str)]
    more = ", ..." if len(names) > MAX_KEYS else ""
    return f" but under {', '.join(names[:MAX_KEYS])}{more}" if names else ""


def _valid_text(text: object) -> str:
    if isinstance(text, bytes):  # a column that was written without saying that it is text
        text = text.decode()
    if not isinstance(text, str):
        raise ValueError("no string in this row")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise ValueError("text is not valid Unicode") from None
    return text


def _csv_rows(raw: BinaryIO, text_key: str) -> Iterator[Record]:
    """The rows after the header. Bytes that are no UTF-8, and quotation marks that do not pair, spoil their own row."""
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header = text.readline()
    columns = {separator: next(csv.reader([header], delimiter=separator), []) for separator in SEPARATORS}
    separator = next((separator for separator in SEPARATORS if text_key in columns[separator]), ",")
    rows = csv.reader(chain([header], text), delimiter=separator, strict=True)
    names = next(rows, [])
    if names and text_key not in names:
        raise WrongKey(f"it has no column {text_key!r} but {', '.join(names[:MAX_KEYS])}")
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{error}, in lines {begin} to {rows.line_num}, which are lost"
            yield begin, partial(_refuse_row, f"{where}; a quotation mark in the text is written twice")
        else:
            yield rows.line_num, partial(_text_of_row, row, len(names), names.index(text_key))


def _refuse_row(why: str) -> str | None:
    raise ValueError(why)


def _text_of_row(row: list[str], num_columns: int, column: int) -> str | None:
    """The text of a row of a CSV file; None for a blank line. Raises ValueError for a row of another length."""
    if not row:
        return None
    if len(row) != num_columns:
        raise ValueError(f"the row has {len(row)} columns, the first row of the file {num_columns}")
    return _valid_text(row[column])


def _paragraphs(lines: BinaryIO) -> Iterator[Record]:
    """Paragraphs, each with the number of its first line; long ones are cut at line ends."""
    first, size, parts = 1, 0, list[bytes]()
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
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


def _rows(raw: BinaryIO, text_key: str) -> Iterator[Record]:
    from pyarrow import parquet, types  # costs 0.1 s and is needed for this format only

    table = parquet.ParquetFile(raw)
    names = table.schema_arrow.names
    if text_key not in names:
        raise WrongKey(f"it has no column {text_key!r} but {', '.join(names[:MAX_KEYS])}")
    kind = table.schema_arrow.types[names.index(text_key)]
    if types.is_nested(kind) or types.is_primitive(kind):
        raise WrongKey(f"its column {text_key!r} holds {kind} and not strings")
    batches = table.iter_batches(batch_size=ROWS_PER_READ, columns=[text_key])
    texts = (text for batch in batches for text in batch.column(0).to_pylist())
    for number, text in enumerate(texts, 1):
        yield number, partial(_valid_text, text)
