"""File formats against files written here, whole and damaged."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random

import pyarrow
import pytest
from pyarrow import parquet

from sltrain.data import records
from sltrain.data.documents import BadData, DataError, NetworkError
from sltrain.data.sources.local import LocalFiles

TEXTS = [f"text number {i}\nwith a second line, é and 漢字" for i in range(50)]


def json_lines(texts):
    return "".join(json.dumps({"text": text, "url": "", "timestamp": ""}) + "\n" for text in texts).encode()


def read(source, **selection):
    return [(d.index, d.text) for shard in range(source.num_shards) for d in source.documents(shard, **selection)]


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def write(path, data):
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return str(path)


def csv_rows(texts, key="text"):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["url", key], *(["x", text] for text in texts)])
    return file.getvalue().encode()


@pytest.mark.parametrize(
    "name",
    "a.jsonl a.json a.json.gz a.jsonl.gz a.parquet a.txt a.txt.gz a.csv a.csv.gz a.jsonl.zst a.txt.bz2 a.json.xz "
    "a.csv.zst".split(),
)
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"url": ["x"] * 50, "text": TEXTS}), path, row_group_size=7)
    elif ".csv" in name:
        write(path, csv_rows(TEXTS))
    elif ".txt" in name:
        write(path, ("\n\n \n".join(TEXTS) + "\n").encode())
    else:
        write(path, json_lines(TEXTS))
    source = LocalFiles(str(path), "stop")
    found = read(source)
    assert [index for index, _ in found] == list(range(50))
    assert [text.rstrip("\n") for _, text in found] == TEXTS
    for step, offset, start in [(3, 0, 0), (3, 2, 17), (1, 0, 49), (7, 6, 100)]:
        part = read(source, start=start, wanted=lambda index, step=step, offset=offset: index % step == offset)
        assert part == [(i, t) for i, t in found if i >= start and i % step == offset]


def test_a_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} of a long file\n" for i in range(10_000)]
    found = read(LocalFiles(write(tmp_path / "a.txt", "".join(lines).encode())))
    assert len(found) > 3 and "".join(text for _, text in found) == "".join(lines)
    assert all(text.endswith("\n") and len(text) <= 1 << 16 for _, text in found)


def test_files_are_read_in_order_of_their_paths_each_once(tmp_path, monkeypatch):
    for name in ["b.jsonl", "a.jsonl", "c[1].jsonl"]:
        write(tmp_path / name, json_lines([name]))
    source = LocalFiles([f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl", f"{tmp_path}/c[1].jsonl"])
    assert [text for _, text in read(source)] == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LocalFiles("~/?.jsonl").num_shards == 2


def test_a_file_counts_once_however_many_links_lead_to_it(tmp_path, lines):
    """Two links from a folder to itself: a search that follows both everywhere finds 2^40 paths."""
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", json_lines(["a"]))
    write(tmp_path / "deep" / "b.jsonl", json_lines(["b"]))
    (tmp_path / "beside.jsonl").symlink_to("a.jsonl")
    for name in ("one", "two"):
        (tmp_path / "deep" / name).symlink_to(tmp_path)
    source = LocalFiles(f"{tmp_path}/**/*.jsonl")
    assert [os.path.relpath(path, tmp_path) for path in source.paths] == ["a.jsonl", "deep/b.jsonl"]
    assert "1 of 3 paths lead to files that others lead to as well" in lines[-1]
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "linked").symlink_to(tmp_path / "deep")
    assert [text for _, text in read(LocalFiles(f"{tmp_path}/apart/**"))] == ["b", "a"]  # links are followed


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_text_is_under_the_key_that_was_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    else:
        write(
            path, csv_rows(TEXTS, "body") if name.endswith(".csv") else json_lines(TEXTS).replace(b'"text"', b'"body"')
        )
    source = LocalFiles(str(path), text_key="body")
    source.check()
    assert [text for _, text in read(source)] == TEXTS
    assert source.fingerprint() != LocalFiles(str(path)).fingerprint()


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_a_parquet_column_of_any_kind_of_text_is_read(tmp_path, kind):
    column = pyarrow.array([text.encode() for text in TEXTS] if kind == pyarrow.binary() else TEXTS).cast(kind)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [text for _, text in read(LocalFiles(f"{tmp_path}/a.parquet"))] == TEXTS


@pytest.mark.parametrize("separator", [";", "\t"])
def test_columns_may_be_separated_by_semicolons_or_tabs(tmp_path, separator):
    rows = [["id", "text"], ["1", "a, b"], ["2", f"c{separator}d"]]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator).writerows(rows)
    source = LocalFiles(write(tmp_path / "a.csv", file.getvalue().encode()), "stop")
    source.check()
    assert [text for _, text in read(source)] == ["a, b", f"c{separator}d"]


def test_a_quotation_mark_without_a_second_spoils_no_other_row(tmp_path, lines):
    """Read leniently, the text of the row would be that of all rows up to the next mark, or to the end of the file."""
    path = write(tmp_path / "a.csv", b'n,text\n1,one\n2,"two\n3,"three"\n4,four\n5,"fi""ve"\n6,"six\n7,seven\n')
    assert [text for _, text in read(LocalFiles(path))] == ["one", "four", 'fi"ve']
    assert [line.split(": ")[0] for line in lines] == [f"{path}:3", f"{path}:7"]
    assert "in lines 3 to 4, which are lost; a quotation mark in the text is written twice" in lines[0]
    with pytest.raises(DataError, match=r"a\.csv:3: "):
        read(LocalFiles(path, "stop"))


def test_a_bad_row_of_a_csv_file_is_skipped_alone(tmp_path, lines):
    path = write(tmp_path / "a.csv", b'text,n\n"a, ""b""\nc",1\nshort\n\xff,2\n\nlast,3\n')
    assert read(LocalFiles(path)) == [(0, 'a, "b"\nc'), (4, "last")]
    assert ["columns" in lines[0], "not valid Unicode" in lines[1], len(lines)] == [True, True, 2]


def test_the_fingerprint_follows_names_and_sizes_not_the_folder(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    prints = [LocalFiles(write(tmp_path / d / "a.jsonl", json_lines(TEXTS))).fingerprint() for d in "xy"]
    assert prints[0] == prints[1]
    assert LocalFiles(write(tmp_path / "a.jsonl", json_lines(TEXTS[1:]))).fingerprint() != prints[0]


MEMBERS = [json_lines(TEXTS[start : start + 10]) for start in range(0, 50, 10)]


@pytest.mark.parametrize(
    ("suffix", "between"),
    [
        (".gz", b""),
        (".gz", bytes(512)),
        (".bz2", b""),
        (".xz", b""),
        (".xz", bytes(8)),  # the format allows it
        (".zst", b""),
        (".zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd"),  # a frame to be skipped, as pzstd writes
    ],
)
def test_all_members_of_a_compressed_file_are_read(tmp_path, suffix, between):
    compress = COMPRESS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(between.join(map(compress, MEMBERS)) + between)
    source = LocalFiles(f"{tmp_path}/*", "stop")
    assert [text for _, text in read(source)] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("after", [b"", b"no member"])
def test_what_is_no_member_is_damage(tmp_path, suffix, after, lines):
    """The readers of Python's library take it for the end of a .bz2 or .xz file, and an empty .gz file for a text
    without a letter."""
    whole = b"".join(map(COMPRESS[suffix], MEMBERS[:3]))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole + after + whole if after else b"")
    count = 30 if after and suffix != ".zst" else 0  # of a .zst file, the buffer in which the damage shows is lost
    assert [text for _, text in read(LocalFiles(str(path)))] == TEXTS[:count]
    assert len(lines) == 1 and f"{path} is damaged {'after its record 30' if count else 'at its beginning'}" in lines[0]
    with pytest.raises(DataError, match="is damaged"):
        read(LocalFiles(str(path), "stop"))


def test_endings_may_be_in_capital_letters(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(json_lines(TEXTS)))
    write(tmp_path / "B.Txt", b"text\n")
    source = LocalFiles(f"{tmp_path}/*", "stop")
    source.check()
    assert [text for _, text in read(source)] == [*TEXTS, "text\n"]


def test_the_mark_that_some_editors_begin_a_file_with_is_no_text(tmp_path):
    for name, content in {"a.txt": "one\n\ntwo", "b.csv": "text\nthree", "c.jsonl": '{"text": "four"}'}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [text for _, text in read(LocalFiles(f"{tmp_path}/*", "stop"))] == ["one\n", "two", "three", "four"]


def test_a_link_to_nothing_is_named(tmp_path):
    """As in a copy of the Hub's cache without its blobs. Left out, its text would be missed by nobody."""
    write(tmp_path / "a.jsonl", json_lines(TEXTS))
    (tmp_path / "b.jsonl").symlink_to("../blobs/0123")
    for pattern in ("*.jsonl", "b*", "b.jsonl", "**"):
        with pytest.raises(ValueError, match=r"b\.jsonl is a link to \.\./blobs/0123, which does not exist"):
            LocalFiles(f"{tmp_path}/{pattern}")


def test_a_folder_that_a_glob_matches_is_named(tmp_path, lines):
    (tmp_path / "out.jsonl").mkdir()  # as Spark writes
    write(tmp_path / "out.jsonl" / "part-0.jsonl", json_lines(TEXTS[:5]))
    write(tmp_path / "b.jsonl", json_lines(TEXTS[5:]))
    with pytest.raises(
        ValueError, match=r"out\.jsonl is a folder; name the files in it, for example path=.*out\.jsonl/\*"
    ):
        LocalFiles(f"{tmp_path}/*.jsonl")
    assert len(read(LocalFiles(f"{tmp_path}/**"))) == 50 and lines == []
    (tmp_path / "out.jsonl").rename(tmp_path / "out")
    assert len(read(LocalFiles(f"{tmp_path}/*"))) == 45
    assert len(lines) == 1 and f"folders are not entered, such as {tmp_path}/out; **" in lines[0]


def test_brackets_may_be_part_of_a_name(tmp_path):
    (tmp_path / "[a-c] texts").mkdir()
    write(tmp_path / "[a-c] texts" / "1.jsonl", json_lines(TEXTS))
    for pattern in ("*.jsonl", "**"):
        assert len(read(LocalFiles(f"{tmp_path}/[a-c] texts/{pattern}"))) == 50
    (tmp_path / "b texts").mkdir()
    write(tmp_path / "b texts" / "1.jsonl", json_lines(TEXTS[:3]))
    assert len(read(LocalFiles(f"{tmp_path}/[a-c] texts/*.jsonl"))) == 3  # a class of characters, if one fits


def test_files_with_the_same_text_are_named(tmp_path, lines):
    write(tmp_path / "a.jsonl", json_lines(TEXTS[:10]))
    write(tmp_path / "a.jsonl.gz", json_lines(TEXTS[:10]))  # gzip --keep
    write(tmp_path / "b (1).jsonl", json_lines(TEXTS[10:]))
    write(tmp_path / "b.jsonl", json_lines(TEXTS[10:]))
    write(tmp_path / "c.jsonl", json_lines(TEXTS[10:][::-1]))  # the same size
    write(tmp_path / "d.jsonl", b"")
    write(tmp_path / "e.jsonl", b"")
    LocalFiles(f"{tmp_path}/*").check()
    assert [line.replace(f"{tmp_path}/", "") for line in lines] == [
        "a.jsonl and a.jsonl.gz hold the same text, by their names; it is read twice",
        "b (1).jsonl and b.jsonl hold the same text, by their sizes, beginnings and ends; it is read twice",
    ]


def test_wrong_paths_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\*\.gz matches no file"):
        LocalFiles(f"{tmp_path}/nothing*.gz")
    with pytest.raises(ValueError, match=r"is a folder.*json\.gz"):
        LocalFiles(str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown ending.*\.parquet"):
        LocalFiles(write(tmp_path / "a.tsv", b"x"))
    with pytest.raises(ValueError, match=r"s3://bucket/a\.jsonl is an address.*data=hf"):
        LocalFiles("s3://bucket/a.jsonl")
    with pytest.raises(ValueError, match="no path given"):
        LocalFiles([])
    with pytest.raises(ValueError, match="skip or stop"):
        LocalFiles(write(tmp_path / "a.txt", b"x"), "perhaps")


@pytest.mark.parametrize(
    "bad",
    [
        b'{"text": "broken\n',
        b'{"txt": "no text"}\n',
        b'{"text": 3}\n',
        b"[1, 2]\n",
        b'{"text": "\xff"}\n',
        b'{"text": "\\ud800"}\n',
    ],
)
def test_a_bad_record_alone_is_skipped_and_reported_once(tmp_path, bad, lines):
    good = json_lines(TEXTS).splitlines(keepends=True)
    path = write(tmp_path / "a.json.gz", b"".join([*good[:20], bad, *good[20:]]))
    source = LocalFiles(path, "skip")
    for _ in range(2):
        assert [text for _, text in read(source)] == TEXTS
    assert len(lines) == 1 and f"{path}:21:" in lines[0] and lines[0].endswith("record skipped")
    with pytest.raises(DataError, match=r"a\.json\.gz:21: .*on_bad_data=skip"):
        read(LocalFiles(path, "stop"))


def test_of_many_bad_records_the_first_are_reported(tmp_path, lines):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", b"nonsense\n" * 100 + json_lines(TEXTS) + b"\n\n")
    source = LocalFiles(f"{tmp_path}/*.jsonl", "skip")
    for _ in range(2):
        assert len(read(source)) == 100
    named = [line.removeprefix(f"{tmp_path}/").split(": ")[0] for line in lines]
    assert named == [f"{file}.jsonl{line}" for file in "ab" for line in (":1", ":2", ":3", "")]
    assert ["only their number" in line for line in lines] == 2 * [False, False, True, False]
    assert lines[3].endswith("a.jsonl: 100 records skipped so far")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_the_rest_of_a_damaged_gzip_file_is_skipped(tmp_path, damage, lines):
    random.seed(0)
    texts = ["".join(random.choices("abcdefgh ", k=800)) for _ in range(400)]
    whole = gzip.compress(json_lines(texts))
    half = len(whole) // 2
    data = whole[:half] if damage == "truncated" else whole[:half] + bytes(64) + whole[half + 64 :]
    (tmp_path / "b.json.gz").write_bytes(data)
    write(tmp_path / "c.jsonl", json_lines(TEXTS))
    source = LocalFiles(f"{tmp_path}/*", "skip")
    for _ in range(2):
        found = [d.text for d in source.documents(0)]
        assert 100 < len(found) < 300 and found == texts[: len(found)]
    assert [d.text for d in source.documents(1)] == TEXTS  # the next file is whole
    damaged = [line for line in lines if "rest of the file skipped" in line]
    assert len(damaged) == 1 and "b.json.gz" in damaged[0]
    last_good = int(damaged[0].split("after its record ")[1].split()[0])
    assert last_good == len(found)
    with pytest.raises(DataError, match=r"b\.json\.gz(:\d+| is damaged after its record)"):
        list(LocalFiles(f"{tmp_path}/b*", "stop").documents(0))


@pytest.mark.parametrize("name", ["a.json.gz", "a.parquet"])
def test_a_file_of_another_kind_is_skipped_as_damaged(tmp_path, name, lines):
    (tmp_path / name).write_bytes(b"this is neither gzip nor parquet")
    assert read(LocalFiles(str(tmp_path / name), "skip")) == []
    assert len(lines) == 1 and "is damaged at its beginning" in lines[0]


def test_a_parquet_file_without_text_says_what_it_has(tmp_path):
    parquet.write_table(pyarrow.table({"content": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text' but content"):
        read(LocalFiles(f"{tmp_path}/a.parquet", "stop"))


def test_a_file_that_vanished_or_may_not_be_read(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    source = LocalFiles(path)
    os.chmod(path, 0)
    if not os.access(path, os.R_OK):  # the administrator may read everything
        with pytest.raises(DataError, match="permissions"):
            source.check()
        with pytest.raises(DataError, match="permissions"):
            read(source)
    os.remove(path)
    with pytest.raises(DataError, match="is gone"):
        read(source)
    with pytest.raises(DataError, match="cannot be read"):
        source.fingerprint()


class Unreliable(io.RawIOBase):
    """The bytes of a file, which a read from `where` on may not get: an error comes as often as `errors` says."""

    def __init__(self, data, where, errors):
        self.file, self.where, self.errors = io.BytesIO(data), where, errors

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *position):
        return self.file.seek(*position)

    def readinto(self, buffer):
        if self.file.tell() >= self.where and self.errors:
            self.errors.pop()
            raise OSError(5, os.strerror(5))
        return self.file.readinto(buffer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.xz", "a.csv", "a.parquet"])
def test_a_read_that_fails_now_and_then_loses_no_text(tmp_path, name, monkeypatch, lines):
    """The disk refuses twice in the middle, then reads: every document comes once."""
    monkeypatch.setattr(records, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    texts = [f"{i} " + " ".join(random.Random(i).choices("abcdefgh", k=400)) for i in range(100)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=9)
    else:
        write(path, {"txt": "\n\n".join(texts).encode(), "csv": csv_rows(texts)}.get(name[2:5], json_lines(texts)))
    data, errors = path.read_bytes(), [1, 2]
    opener = lambda: io.BufferedReader(Unreliable(data, len(data) // 2, errors), 512)  # noqa: E731
    found = list(records.read_documents(opener, name, BadData("skip")))
    assert not errors and not lines
    assert [(document.index, document.text.strip()) for document in found] == list(enumerate(texts))


def test_a_read_that_goes_on_failing_ends_the_reading_in_words(monkeypatch, lines):
    """on_bad_data=skip does not concern it: no text is lost, and a run saves and may go on later."""
    monkeypatch.setattr(records, "RETRY_SECONDS", (0.0, 0.0))
    texts = ["word " * 100 for _ in range(50)]
    data, errors = json_lines(texts), list(range(99))
    opener = lambda: io.BufferedReader(Unreliable(data, len(data) // 2, errors), 512)  # noqa: E731
    reading, found = records.read_documents(opener, "a.jsonl", BadData("skip")), []
    with pytest.raises(NetworkError, match=r"^a\.jsonl cannot be read after its record 2\d: Input/output error"):
        for document in reading:
            found.append(document)
    assert [document.index for document in found] == list(range(len(found))) and 20 <= len(found) < 30
    assert len(errors) == 96 and not lines
