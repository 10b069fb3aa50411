"""data=hf: what `datasets` opens, read as a list of the same texts would be, from this machine and from a Hub on it."""

import gzip
import io
import json
import random

import datasets
import pyarrow
import pytest
from loopback_hub import REVISION, hub  # noqa: F401  (a fixture)
from pyarrow import parquet
from resuming import resumes_bit_for_bit

from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, Document, NetworkError
from sltrain.data.sources.hf import HuggingFace
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer

ROW_GROUP = 30
TEXTS = [
    f"{i} " + " ".join(random.Random(i).choices("alpha beta gamma delta".split(), k=i % 20 + 1)) for i in range(200)
]
PARTS = [TEXTS[:130], TEXTS[130:]]  # two files
KINDS = ["json", "parquet", "saved", "table", "hub_json", "hub_parquet"]


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet_file(texts):
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, file, row_group_size=ROW_GROUP)
    return file.getvalue()


@pytest.fixture
def the_hub(hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    return hub


@pytest.fixture
def opened(the_hub, tmp_path, monkeypatch):
    """Opens the corpus TEXTS, anew every time, as one of KINDS; gives the source and the texts of its shards."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for kind, suffix, write in (
        ("json", "jsonl.gz", lambda t: gzip.compress(jsonl(t))),
        ("parquet",) * 2 + (parquet_file,),
    ):
        (tmp_path / kind).mkdir()
        for number, part in enumerate(PARTS):
            (tmp_path / kind / f"train-{number}.{suffix}").write_bytes(write(part))
            the_hub.files[f"some/{kind}", f"data/train-{number}.{suffix}"] = write(part)
    saved = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS}))
    saved.save_to_disk(tmp_path / "saved", num_shards={"train": 3})
    groups = [part[i : i + ROW_GROUP] for part in PARTS for i in range(0, len(part), ROW_GROUP)]
    shards = {"json": PARTS, "parquet": groups, "saved": [TEXTS], "table": [TEXTS]}

    def open_it(kind, **options):
        name = kind.removeprefix("hub_")
        folder = str(tmp_path / ("json" if kind == "table" else name))
        repo = f"some/{name}" if kind.startswith("hub_") else folder
        config = HuggingFace(name="hf", repo=repo, streaming=kind != "table", **options)
        config.check()
        return config.open_training(), shards[name]

    return open_it


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_those_of_the_files_from_any_position(opened, kind):
    source, shards = opened(kind)
    assert source.num_shards == len(source.shard_sizes()) == len(shards)
    for shard, texts in enumerate(shards):
        for start in (0, 1, len(texts) - 1):
            expected = [Document(i, texts[i]) for i in range(start, len(texts))]
            assert list(source.documents(shard, start)) == expected
            odd = list(source.documents(shard, start, lambda i: i % 3 == 1))
            assert odd == [document for document in expected if document.index % 3 == 1]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_bpe(iter(TEXTS), 300), "test")


def stream_of(source, tokenizer, **changes):
    shape = {"seed": 1, "seq_len": 16, "padding": "pack", "global_batch_size": 8, "num_streams": 4, "shuffle_block": 7}
    return TrainStream(source, tokenizer, **{**shape, "holdout_every": 5, "prefetch": 2, **changes})


def rows_of(streams, count):
    """The rows of `count` global batches of these ranks, which are closed then, and their merged state."""
    rows = [row for _ in range(count) for stream in streams for row in next(stream).input_ids.tolist()]
    state = {key: value for stream in streams for key, value in stream.state_dict().items()}
    for stream in streams:
        stream.close()
    return rows, json.dumps(state)


@pytest.mark.parametrize("kind", KINDS)
def test_two_stops_give_the_rows_of_a_straight_run_on_1_2_and_4_ranks(opened, tokenizer, kind):
    legs = [(17, 1), (20, 2), (23, 4)]  # more than an epoch
    straight, _ = rows_of([stream_of(opened(kind)[0], tokenizer)], sum(count for count, _ in legs))
    resumed, saved = [], None
    for count, world_size in legs:
        streams = [stream_of(opened(kind)[0], tokenizer, rank=r, world_size=world_size) for r in range(world_size)]
        if saved is not None:
            for stream in streams:
                stream.load_state_dict(json.loads(saved))
        rows, saved = rows_of(streams, count)
        resumed += rows
    assert resumed == straight


def test_a_resume_from_another_revision_or_other_files_is_refused(opened, the_hub, tokenizer, tmp_path):
    for kind in ("hub_json", "json"):
        stream = stream_of(opened(kind)[0], tokenizer)
        _, state = rows_of([stream], 1)
        if kind == "hub_json":
            the_hub.revision = "f" * 40
        else:
            (tmp_path / "json" / "train-1.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
        with pytest.raises(ValueError, match="the corpus .* has changed since the checkpoint: it was"):
            stream_of(opened(kind)[0], tokenizer).load_state_dict(json.loads(state))


def test_all_ranks_read_the_commit_that_one_has_settled(opened, the_hub):
    opened("hub_json")
    first, second = (HuggingFace(name="hf", repo="some/json") for _ in range(2))
    settled = first.settled()
    the_hub.older.add(REVISION)
    the_hub.revision = "f" * 40
    second.adopt(settled)
    assert second.open_training().fingerprint() == first.open_training().fingerprint()
    other = HuggingFace(name="hf", repo="some/json", revision="main")
    other.adopt(settled)
    assert other.open_training().fingerprint() != first.open_training().fingerprint()


@pytest.mark.parametrize("kind", ["hub_json", "hub_parquet"])
def test_a_lost_connection_changes_no_row(opened, the_hub, tokenizer, kind, monkeypatch, lines):
    straight, _ = rows_of([stream_of(opened(kind)[0], tokenizer)], 30)
    stream = stream_of(opened(kind)[0], tokenizer)
    monkeypatch.setattr("sltrain.data.sources.hf.FIRST_WAIT", 0.01)
    the_hub.faults += [520, None, 520, 520]  # a status that nothing below sltrain tries again
    assert rows_of([stream], 30)[0] == straight
    retries = [line for line in lines if "the server answered 520; retry in" in line]
    assert len(retries) == 3 and "in 0.01 s from record 0 of shard" in retries[0]

    monkeypatch.setattr("sltrain.data.sources.hf.GIVE_UP_AFTER", 0.02)
    stream = stream_of(opened(kind)[0], tokenizer)
    the_hub.faults += [520] * 1000
    with pytest.raises(NetworkError, match="cannot reach some/.* on the Hub: the server answered 520"):
        next(stream)
    stream.close()


def test_what_cannot_be_opened_is_one_line(the_hub, tmp_path, monkeypatch):
    readme = b"---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    the_hub.files.update({("some/two", name): jsonl(["x"]) for name in ("a.jsonl", "b.jsonl")})
    the_hub.files["some/two", "README.md"] = readme
    the_hub.files["some/script", "script.py"] = b"import datasets"
    for name in ("private", "gated", "empty"):
        the_hub.files[f"some/{name}", "README.md"] = b"# nothing"
    the_hub.private.update({"some/private": "RepoNotFound", "some/gated": "GatedRepo"})
    for name, content in (
        ("broken", b"no json\n"),
        ("cut", gzip.compress(jsonl(TEXTS))[:200]),
        ("array", b'[{"a": 1}]'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("a.json.gz" if name == "cut" else "a.json")).write_bytes(content)
    saved = datasets.Dataset.from_dict({"text": ["x"], "number": [1]})
    saved.save_to_disk(tmp_path / "saved")
    for options, words in [
        ({}, "data=hf needs repo=OWNER/NAME"),
        ({"repo": f"{tmp_path}/nothing"}, "neither a folder here nor a name on the Hub"),
        ({"repo": f"{tmp_path}/broken/a.json"}, "is a file; use data=local path="),
        ({"repo": "some/none"}, "some/none: the Hub has no such repository, or it is private.*hf auth login"),
        ({"repo": "some/private"}, "no such repository, or it is private.*hf auth login"),
        ({"repo": "some/gated"}, "access is gated; accept its terms on the Hub and log in"),
        ({"repo": "some/two"}, "set data.config to one of its configurations 'a', 'b'"),
        ({"repo": "some/two", "config": "c"}, "set data.config to one of its configurations 'a', 'b'"),
        ({"repo": "some/two", "config": "a", "split": "dev"}, "no split 'dev' but train"),
        ({"repo": "some/two", "config": "a", "revision": "v9"}, "no such revision"),
        ({"repo": "some/two", "config": "a", "revision": "e" * 40}, "some/two.*no such revision"),
        ({"repo": "some/two", "config": "a", "text_key": "body"}, "no column 'body' but id, text; set data.text_key"),
        ({"repo": "some/two", "config": "a", "text_key": "id"}, "column 'id' holds .*int64.*, not strings"),
        ({"repo": "some/two", "files": "*.parquet"}, "cannot be opened: "),
        ({"repo": "some/script"}, "is a script"),
        ({"repo": "some/empty"}, "it has no data files"),
        ({"repo": f"{tmp_path}/broken"}, "broken cannot be opened: "),
        ({"repo": f"{tmp_path}/cut"}, "cut cannot be opened: Compressed file ended"),
        ({"repo": f"{tmp_path}/array"}, "has no column 'text' but a"),
        ({"repo": f"{tmp_path}/saved", "split": "validation"}, "no split 'validation' but train"),
        ({"repo": f"{tmp_path}/saved", "text_key": "number"}, "column 'number' holds"),
    ]:
        config = HuggingFace(name="hf", **options)
        with pytest.raises(ValueError, match=words) as error:
            config.check()
            config.open_training()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="cannot reach some/two on the Hub: ConnectionRefusedError"):
        HuggingFace(name="hf", repo="some/two").open_training()


def test_damaged_records_and_files_follow_the_rule(tmp_path, lines):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x", None, "", "y"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS * 200), 1)[:-5000])

    def read(on_bad_data):
        source = HuggingFace(name="hf", repo=str(tmp_path), on_bad_data=on_bad_data).open_training()
        return [[d.text for d in source.documents(shard)] for shard in range(2)]

    small, large = read("skip")
    assert small == ["x", "y"] and "no string in column 'text'; record skipped" in lines[0]
    assert large == (TEXTS * 200)[: len(large)] and "is damaged" in lines[-1]
    with pytest.raises(DataError, match=r"shard 0:2: no string in column 'text'; fix it"):
        read("stop")


def read_folder(folder, lines=None, **options):
    """The texts of every shard of a folder, and what was said, without the folder's name."""
    source = HuggingFace(name="hf", repo=str(folder), **options).open_training()
    texts = [[d.text for d in source.documents(shard)] for shard in range(source.num_shards)]
    return texts, [line.replace(f"{folder}", "F") for line in lines or []]


def test_only_the_column_that_is_read_must_be_the_same_in_all_json_files(tmp_path, lines):
    """datasets compares all columns of a file with those of the first, and gives up what differs."""
    for name, columns in {"a": {"n": 1}, "b": {"n": "one", "new": [1]}, "c": {}, "d": {"n": {"m": None}}}.items():
        rows = [{"text": f"{name} {i}", **columns} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "e.jsonl").write_bytes(jsonl(["no text"]).replace(b"text", b"body"))
    texts, said = read_folder(tmp_path, lines)
    assert texts == [[f"{name} {i}" for i in range(3)] for name in "abcd"] + [[]]
    assert said == ["F train, shard 4:1: no string in column 'text'; record skipped"]


def small_parts(config):
    """The defaults of a JsonConfig that reads files in parts of 1 kB instead of 10 MB."""
    return tuple(1000 if default == 10 << 20 else default for default in config.__init__.__defaults__)


@pytest.mark.parametrize("first", [0, 60])
def test_a_value_of_another_kind_among_the_texts_is_one_bad_record(tmp_path, first, lines, monkeypatch):
    """datasets encodes all values of its part of the file as JSON then: \"a\" becomes "\\"a\\""."""
    from datasets.packaged_modules.json.json import JsonConfig

    monkeypatch.setattr(JsonConfig.__init__, "__defaults__", small_parts(JsonConfig))
    values = [*TEXTS[:first], *TEXTS[first : first + 20], 7, ["a"], None, *TEXTS[first + 20 :]]
    (tmp_path / "a.jsonl").write_bytes(jsonl(values))
    texts, said = read_folder(tmp_path, lines)
    assert texts == [TEXTS]
    assert [line.split(":")[1] for line in said] == [str(first + 20 + number) for number in (1, 2, 3)]


def test_data_files_that_datasets_leaves_out_are_named(tmp_path, lines):
    (tmp_path / "train-a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "books.jsonl").write_bytes(jsonl(["b"]))
    (tmp_path / "c.parquet").write_bytes(parquet_file(["c"]))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("# Texts")
    texts, said = read_folder(tmp_path, lines)
    assert texts == [["a"]] and len(said) == 1
    assert said[0].startswith("F: datasets leaves out books.jsonl, c.parquet: it takes one format, and splits (train)")
    lines.clear()
    assert read_folder(tmp_path, lines, files="*.jsonl") == ([["b"], ["a"]], [])


def test_folders_that_cannot_be_read_whole_are_one_line(tmp_path):
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a.jsonl").write_bytes(jsonl(["a"]))
    with pytest.raises(DataError, match=r"datasets takes \[ \] \* \? for a pattern; rename the folder"):
        read_folder(tmp_path / "[x]")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "linked" / "b.jsonl").symlink_to("../blobs/0123")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to \.\./blobs/0123, which does not exist"):
        read_folder(tmp_path / "linked")


def test_the_validation_split_is_its_own_corpus(tmp_path):
    parts = {"train": TEXTS[:3], "dev": TEXTS[3:5]}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()}).save_to_disk(tmp_path)
    config = HuggingFace(name="hf", repo=str(tmp_path), validation_split="dev")
    assert [d.text for d in config.open_validation().documents(0)] == TEXTS[3:5]
    assert HuggingFace(name="hf", repo=str(tmp_path)).open_validation() is None


@pytest.mark.slow
def test_a_whole_run_resumes_bit_for_bit_from_the_commit_it_began_with(opened, the_hub, tmp_path, tiny, sltrain_train):
    opened("hub_parquet")
    recipe = [override for override in tiny if not override.startswith(("data=", "path="))]
    recipe += ["data=hf", "repo=some/parquet", "config=default", "data.num_streams=4", "data.shuffle_block=8"]

    def train_then_push(*overrides):
        result = sltrain_train(*overrides)
        the_hub.older.add(the_hub.revision)
        the_hub.revision = f"{len(the_hub.older):040x}"
        return result

    resumes_bit_for_bit(recipe, train_then_push, tmp_path, at=(2, 4))
    assert f"commit: {REVISION}\n" in (tmp_path / "stopped_4" / "config.yaml").read_text()
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/stopped_2", "data.revision=main")[0] == 2
