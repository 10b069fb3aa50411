"""Whole files of another kind than their names say: each is refused before training with its cure."""

import gzip
import io
import json
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from sltrain.data.documents import DataError
from sltrain.data.sources.local import LocalFiles


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def tar_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def table_of(column: list) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


def over_a_long_distance(content: bytes) -> bytes:
    """A .zst file as `zstd --long=29` writes it: a window of 2^29 bytes, and one block that is not compressed
    (RFC 8878, sections 3.1.1.1.2 and 3.1.1.2)."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([(29 - 10) << 3]) + (len(content) << 3 | 1).to_bytes(3, "little") + content


GOOD = json_lines(["some text", "more text"])
ZST = pyarrow.compress(GOOD, codec="zstd", asbytes=True)
WRONG_KINDS = {
    "array.json": (b'[\n{"text": "a"},\n{"text": "b"}]', r"JSON array.*jq -c '\.\[\]'"),
    "pretty.json": (b'{\n  "text": "a"\n}\n', "several lines.*jq -c"),
    "utf16.txt": ("some text".encode("utf-16"), "UTF-16; .*iconv"),
    "utf16.jsonl.gz": (gzip.compress('{"text": "a"}\n'.encode("utf-16-le")), "UTF-16; .*iconv"),
    "big_endian.txt": ("some text".encode("utf-16-be"), "UTF-16; .*iconv"),
    "zipped.jsonl": (gzip.compress(GOOD), r"rename it to .*zipped\.jsonl\.gz"),
    "other.jsonl.gz": (ZST, r"rename it to .*other\.jsonl\.zst"),
    "plain.JSONL.gz": (GOOD, r"it is not compressed; rename it to .*plain\.JSONL$"),
    "long.jsonl.zst": (over_a_long_distance(GOOD), "compress it again: zstd -d --long=31 "),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.jsonl": (b"<!DOCTYPE html>\n<title>503</title>\n", "HTML or XML.*download the data again"),
    "page.json.gz": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "HTML or XML"),
    "archive.jsonl": (b"PK\x03\x04" + bytes(60), "zip archive; unpack it"),
    "archive.jsonl.gz": (gzip.compress(tar_of("a.jsonl", GOOD)), "tar archive; unpack it"),
    "zeros.jsonl": (bytes(600) + GOOD, "zero bytes, as binary and damaged files do"),
    "other_key.jsonl": (b'{"content": "a", "url": "b", "n": 1}\n', "'text' but under content, url; set data.text_key"),
    "other_column.csv": (b"id,content\n1,a\n", "no column 'text' but id, content; set data.text_key"),
    "list.jsonl": (b'{"text": ["a", "b"]}\n', "no string but a list under the key 'text'"),
    "number.jsonl": (b'{"text": 12}\n', "no string but a number under the key 'text'"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "no string under the key 'text'; set data"),
    "list.parquet": (table_of([["a"], ["b"]]), "column 'text' holds list<.*> and not strings"),
    "number.parquet": (table_of([1, 2]), "column 'text' holds int64 and not strings"),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_file_of_the_wrong_kind_is_refused_with_its_cure(tmp_path, name, is_alone):
    """Whatever on_bad_data says: skipped, it would be a run on nothing, or on the other files alone."""
    data, words = WRONG_KINDS[name]
    (tmp_path / name).write_bytes(data)
    if not is_alone:
        (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        LocalFiles(f"{tmp_path}/*", "skip").check()


def test_a_corpus_of_blank_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["", " ", "\n"]))
    with pytest.raises(DataError, match="holds no text: every record is blank; supply other files"):
        LocalFiles(f"{tmp_path}/*").check()


def test_a_short_file_is_no_other_kind_for_one_bad_record(tmp_path):
    """Damaged records, nulls and blank ones are left to on_bad_data, and so is a key that some records lack."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "damaged.jsonl").write_bytes(b"{nonsense\n")
    (tmp_path / "null.jsonl").write_bytes(b'{"text": null}\n')
    (tmp_path / "some.jsonl").write_bytes(json_lines(["x"] * 90, "content") + GOOD)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    (tmp_path / "frames.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\0\0\0\0" + ZST)
    LocalFiles(f"{tmp_path}/*", "skip").check()
