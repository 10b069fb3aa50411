"""The training stream against a plain reader: the same rows at every world size and after any number of stops."""

import gzip
import json
import random
import string
import subprocess
import sys
import threading
from collections import defaultdict

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sltrain.data import logical_stream
from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, NetworkError, is_held_out
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer

NUM_DOCUMENTS = 101


def sentence(rng, length):
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6))) for _ in range(length))


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [f"document {i}: {sentence(rng, rng.randint(0, 30))}" for i in range(NUM_DOCUMENTS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, texts):
    """Three files of different lengths, with an empty text among the documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in [("a.json.gz", texts[:50]), ("b.json.gz", texts[50:53]), ("c.json.gz", texts[53:])]:
        lines = [json.dumps({"text": text}) for text in [*part[:2], "", *part[2:]]]
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    return LocalFiles(f"{folder}/*.json.gz")


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer(train_bpe(iter(texts), 350), "test")


DEFAULTS = {"seed": 1, "seq_len": 16, "padding": "pack", "global_batch_size": 8, "num_streams": 4, "shuffle_block": 7}


def make(source, tokenizer, **changes):
    return TrainStream(source, tokenizer, **{**DEFAULTS, "prefetch": 2, **changes})


def take(stream, count):
    """Batches 0 .. count - 1, then the stream is closed."""
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def rows(batches):
    return [row for batch in batches for row in batch.input_ids.tolist()]


def documents_by_stream(source, tokenizer, texts, count, **changes):
    """Numbers of the documents that each stream yields, from rows long enough to hold every document."""
    encoded = {tuple(ids): i for i, ids in enumerate(tokenizer.encode_batch(texts))}
    stream = make(source, tokenizer, padding="truncate_pad", seq_len=512, **changes)
    per_stream = stream.rows_per_stream
    found = defaultdict(list)
    for batch in take(stream, count):
        for i, (ids, labels) in enumerate(zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)):
            length = sum(label != -100 for label in labels)
            assert ids[:length] == labels[:length] and set(ids[length:]) <= {tokenizer.pad_id}
            found[i // per_stream].append(encoded[tuple(ids[:length])])
    return found


def split_epochs(numbers):
    """Cut where a document recurs for the first time since the last cut."""
    epochs, seen = [[]], set()
    for number in numbers:
        if number in seen:
            epochs.append([])
            seen = set()
        seen.add(number)
        epochs[-1].append(number)
    return epochs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_batch_size": 12, "num_streams": 8, "seed": 2},  # 6 streams, two slices a file
        {"global_batch_size": 3, "num_streams": 2},  # one stream
        {"shuffle_block": 1000},
    ],
)
def test_every_document_once_an_epoch_in_one_stream(source, tokenizer, texts, changes):
    found = documents_by_stream(source, tokenizer, texts, 90, **changes)
    first, second = {}, {}
    for stream, numbers in found.items():
        first[stream], second[stream], *_ = split_epochs(numbers)
        assert len(first[stream]) == len(second[stream]) and set(first[stream]) == set(second[stream])
    everything = [number for numbers in first.values() for number in numbers]
    assert sorted(everything) == list(range(NUM_DOCUMENTS))
    assert first != second  # another order
    assert everything != sorted(everything)


@pytest.mark.parametrize("first_kind", ["w0 w0 w0 w0 w0 w0", ""])  # long, or blank
@pytest.mark.parametrize("period", [2, 3, 8])
def test_records_in_a_regular_order_give_every_stream_its_share_of_each_kind(tmp_path, period, first_kind):
    """Record i is of kind i % period, as in a file of titles and bodies in turn."""
    kinds = [first_kind, *(f"w{kind}" for kind in range(1, period))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": kinds[i % period]}) + "\n" for i in range(8000)))
    vocabulary = {"</s>": 0, **{f"w{kind}": kind + 1 for kind in range(8)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    stream = make(LocalFiles(f"{tmp_path}/a.jsonl"), Tokenizer(plain.to_str(), "test"), num_streams=8)
    batches = take(stream, 50)
    assert batches[-1].epoch == 0
    tokens = np.array([len(text.split()) for text in kinds])
    for row in range(8):  # as many as streams
        ids = torch.cat([batch.input_ids[row] for batch in batches])
        found = np.bincount(ids, minlength=9)[1 : period + 1]
        np.testing.assert_allclose(found / found.sum(), tokens / tokens.sum(), rtol=0.5)


def test_the_seed_changes_the_order(source, tokenizer):
    a, b, again = (rows(take(make(source, tokenizer, seed=seed), 5)) for seed in (1, 2, 1))
    assert a == again != b


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
@pytest.mark.parametrize(
    ("batch", "world_size"),
    [(8, 2), (8, 4), (8, 8), (12, 3), (12, 6), (12, 12), (20, 5), (30, 2), (30, 15)],  # of 4 streams; 3 where it is 30
)
def test_the_rows_of_a_global_batch_do_not_depend_on_the_world_size(source, tokenizer, padding, batch, world_size):
    shape = {"padding": padding, "global_batch_size": batch}
    whole = take(make(source, tokenizer, **shape), 20)
    parts = [take(make(source, tokenizer, rank=rank, world_size=world_size, **shape), 20) for rank in range(world_size)]
    for k, batch in enumerate(whole):
        same = [part[k] for part in parts]
        assert len({len(b.input_ids) for b in same}) == 1
        assert torch.equal(torch.cat([b.input_ids for b in same]), batch.input_ids)
        assert torch.equal(torch.cat([b.labels for b in same]), batch.labels)
        assert sum(b.num_tokens for b in same) == batch.num_tokens == int((batch.labels != -100).sum())
        assert sum(b.num_targets for b in same) == batch.num_targets == int((batch.labels[:, 1:] != -100).sum())
        assert {key: value for b in same for key, value in b.state.items()} == batch.state


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    legs=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 6, 12])), min_size=1, max_size=5),
    padding=st.sampled_from(["pack", "truncate_pad", "best_fit"]),
    block=st.sampled_from([1, 7, 64]),
    group=st.sampled_from([3, 128]),
)
def test_any_number_of_stops_gives_the_batches_of_a_straight_run(source, tokenizer, legs, padding, block, group):
    """Each leg runs some batches on some number of ranks, from the merged states of the leg before it. `group`: rows
    that padding=best_fit packs together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logical_stream, "GROUP_ROWS", group)
        check_stops(source, tokenizer, legs, padding, block)


def check_stops(source, tokenizer, legs, padding, block):
    shape = {"padding": padding, "shuffle_block": block, "holdout_every": 5, "global_batch_size": 12}
    straight = rows(take(make(source, tokenizer, **shape), sum(count for count, _ in legs)))
    resumed, saved = [], None
    for count, world_size in legs:
        states, parts = {}, []
        for rank in range(world_size):
            stream = make(source, tokenizer, rank=rank, world_size=world_size, **shape)
            if saved is not None:
                stream.load_state_dict(json.loads(saved))
            parts.append(take(stream, count))
            states.update(stream.state_dict())
        resumed += [row for k in range(count) for part in parts for row in part[k].input_ids.tolist()]
        saved = json.dumps(states)
    assert resumed == straight


def test_the_state_of_every_batch_leads_to_the_next_one(source, tokenizer):
    batches = take(make(source, tokenizer), 60)  # more than an epoch
    assert batches[-1].epoch >= 1
    stream = make(source, tokenizer)
    for k in range(0, 59, 3):
        stream.load_state_dict(batches[k].state)
        assert torch.equal(next(stream).input_ids, batches[k + 1].input_ids)
        assert len(json.dumps(batches[k].state["0"])) < 200
    stream.close()


def test_packing_loses_no_token(source, tokenizer, texts):
    """The rows of each stream, joined, are whole documents one after the other."""
    batches = take(make(source, tokenizer), 15)
    encoded = {tuple(ids) for ids in tokenizer.encode_batch(texts)}
    found = []
    for stream in range(4):
        ids = [i for b in batches for row in b.input_ids[2 * stream : 2 * stream + 2].tolist() for i in row]
        documents, current = [], []
        for i in ids:
            current.append(i)
            if i == tokenizer.eos_id:
                documents.append(tuple(current))
                current = []
        assert all(document in encoded for document in documents)
        assert any(document[: len(current)] == tuple(current) for document in encoded)
        found += documents
    assert len(found) > 20
    assert all(torch.equal(b.labels, b.input_ids) and b.num_tokens == 8 * 16 for b in batches)


@pytest.mark.parametrize("group", [3, 128])
@pytest.mark.parametrize("seq_len", [9, 40])
def test_best_fit_has_every_piece_of_every_document_once_an_epoch(
    source, tokenizer, texts, seq_len, group, monkeypatch
):
    monkeypatch.setattr(logical_stream, "GROUP_ROWS", group)
    wanted = sorted(
        tuple(ids[i : i + seq_len])
        for ids in map(list, tokenizer.encode_batch(texts))
        for i in range(0, len(ids), seq_len)
    )
    alone = {"padding": "best_fit", "seq_len": seq_len, "global_batch_size": 1, "num_streams": 1}
    stream = make(source, tokenizer, per_document=True, **alone)
    orders = []
    for _ in range(2):
        found, room = [], []
        while len(found) < len(wanted):
            batch = next(stream)
            used, ids = batch.num_tokens, batch.input_ids[0].tolist()
            starts = (batch.positions[0, :used] == 0).nonzero().flatten().tolist()
            found += [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], used], strict=True)]
            room.append(seq_len - used)
            pads = [-100] * room[-1]
            assert batch.labels[0].tolist() == [-100 if i in starts[1:] else ids[i] for i in range(used)] + pads
            assert ids[used:] == [tokenizer.pad_id] * room[-1] and batch.num_targets == used - len(starts)
        assert sorted(found) == wanted
        assert room != sorted(room), "the rows of a group come in the order of their packing"
        orders.append(found)
    stream.close()
    assert orders[0] != orders[1]
    full, apart = (rows(take(make(source, tokenizer, per_document=p, **alone), 20)) for p in (False, True))
    assert full == apart


def test_rows_are_truncated_as_the_library_does(source, tokenizer, texts):
    batches = take(make(source, tokenizer, padding="truncate_pad", seq_len=9), 20)
    wanted = {tuple(ids if len(ids) <= 9 else [*ids[:8], tokenizer.eos_id]) for ids in tokenizer.encode_batch(texts)}
    for batch in batches:
        for labels in batch.labels.tolist():
            assert tuple(label for label in labels if label != -100) in wanted


def test_held_out_documents_are_never_trained_on(source, tokenizer, texts):
    found = documents_by_stream(source, tokenizer, texts, 60, holdout_every=4)
    trained = {number for numbers in found.values() for number in numbers}
    held_out = {i for i, text in enumerate(texts) if is_held_out(text, 4)}
    assert trained == set(range(NUM_DOCUMENTS)) - held_out
    assert 10 < len(held_out) < 45


def test_each_new_epoch_is_announced_once(source, tokenizer, lines):
    batches = take(make(source, tokenizer), 200)
    seen = max(batch.epoch for batch in batches)
    assert seen >= 2 and [line.split()[1] for line in lines][:seen] == [str(e + 1) for e in range(1, seen + 1)]
    assert len(lines) == len(set(lines))
    stream = make(source, tokenizer)
    stream.load_state_dict(batches[-1].state)
    lines.clear()
    take(stream, 1)
    assert f"epoch {seen + 1} " not in " ".join(lines)


def test_a_rank_reads_only_its_own_shards(tokenizer, tmp_path, texts):
    for i in range(8):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[i::8]))

    def opened_by(rank):
        files = LocalFiles(f"{tmp_path}/*.jsonl")
        files.shard_sizes = lambda: [1] * 8  # as even as the shards of C4
        opened, read = set(), files.documents
        files.documents = lambda shard, *selection: opened.add(shard) or read(shard, *selection)
        stream = make(files, tokenizer, rank=rank, world_size=4)
        opened.clear()  # of the check of the whole corpus
        take(stream, 30)
        return opened

    owners = [opened_by(rank) for rank in range(4)]
    assert sorted(shard for opened in owners for shard in opened) == list(range(8))


def test_settings_that_cannot_be_used_are_refused(source, tokenizer, tmp_path):
    for changes, words in [
        ({"world_size": 3}, "global_batch_size=8 does not divide among 3 processes"),
        ({"padding": "left"}, "truncate_pad, pack or best_fit"),
        ({"seq_len": 1}, "at least 2"),
        ({"num_streams": 0}, "num_streams is 0"),
        ({"holdout_every": 1}, "holdout_every is 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(source, tokenizer, **changes)


def test_a_changed_corpus_or_setting_is_refused_by_name(source, tokenizer, tmp_path, texts):
    state = take(make(source, tokenizer), 1)[0].state
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    for other, words in [
        (make(LocalFiles(f"{tmp_path}/a.txt"), tokenizer), "the corpus .* has changed .* 3 files.* now it is 1 files"),
        (make(source, tokenizer, seed=7), "seed has changed since the checkpoint: it was 1, now it is 7"),
        (make(source, tokenizer, padding="truncate_pad"), "padding has changed"),
        (make(source, tokenizer, num_streams=2), "data.num_streams has changed"),
        (make(source, Tokenizer(train_bpe(iter(texts), 300), "x")), "tokenizer has changed"),
    ]:
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)


@pytest.mark.parametrize("content", ["", "\n\n", json.dumps({"text": " "}), json.dumps({"text": ""}), "no JSON"])
def test_a_corpus_without_documents_is_an_error_at_once(tokenizer, tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    files = LocalFiles(f"{tmp_path}/a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl holds no text"):
        make(files, tokenizer)


def test_fewer_documents_than_streams_is_an_error_not_a_hang(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    files = LocalFiles(f"{tmp_path}/a.txt")
    with pytest.raises(DataError, match=r"for data stream \d.*lower data.num_streams"):
        take(make(files, tokenizer), 1)
    assert take(make(files, tokenizer, num_streams=2), 3)


def test_errors_of_the_thread_reach_the_consumer_after_the_good_batches(source, tokenizer):
    files = LocalFiles(source.paths)
    read = files.documents

    budget = iter(range(80))  # documents until the network is lost

    def lost(*selection):
        for document in read(*selection):
            if next(budget, None) is None:
                raise NetworkError("the cable was pulled")
            yield document

    files.documents = lost
    stream = make(files, tokenizer)
    reference = make(source, tokenizer)
    good = []
    with pytest.raises(NetworkError, match="cable"):
        while True:
            good.append(next(stream))
    assert good and rows(good) == rows(take(reference, len(good)))
    with pytest.raises(NetworkError):
        next(stream)
    stream.close()
    files.documents = read  # the network is back: the stream continues where it was
    assert rows(take(stream, 3)) == rows(take(make(source, tokenizer), len(good) + 3))[8 * len(good) :]


def test_bad_data_stops_the_stream_when_asked(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n' * 20)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        take(make(LocalFiles(f"{tmp_path}/a.jsonl", "stop"), tokenizer, num_streams=1), 1)
    assert take(make(LocalFiles(f"{tmp_path}/a.jsonl", "skip"), tokenizer, num_streams=1), 1)


def test_close_joins_the_thread_and_may_be_called_at_any_time(source, tokenizer):
    def threads():
        return [t for t in threading.enumerate() if t.name == "sltrain-data"]

    stream = make(source, tokenizer)
    stream.close()
    first = next(stream)
    assert threads()
    stream.close()
    stream.close()
    assert not threads()
    assert not torch.equal(next(stream).input_ids, first.input_ids)  # continues
    stream.close()


def test_the_interpreter_exits_while_the_thread_is_at_work(source, tmp_path, tokenizer):
    (tmp_path / "t.json").write_text(tokenizer.json)
    code = f"""
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.load_tokenizer import load_tokenizer
stream = TrainStream(LocalFiles({source.paths!r}), load_tokenizer({str(tmp_path / "t.json")!r}), seed=0, seq_len=16,
    padding="pack", global_batch_size=8)
next(stream)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
