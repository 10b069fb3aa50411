"""Validation rows against a plain count of tokens and bytes."""

import json
import random
import string
from pathlib import Path

import pytest
import tokenizers
import torch

from sltrain.data import evaluation
from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, is_held_out
from sltrain.data.evaluation import EvalSet
from sltrain.data.load_tokenizer import load_tokenizer
from sltrain.data.sources.local import LocalFiles
from sltrain.data.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
T5 = SHARED / "tokenizers/t5-base/tokenizer.json"


def sentence(rng, length):
    return " ".join("".join(rng.choices(string.ascii_lowercase + "é漢", k=rng.randint(1, 6))) for _ in range(length))


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [f"document {i}: {sentence(rng, rng.randint(0, 30))}" for i in range(97)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in [("a.jsonl", texts[:40]), ("b.jsonl", texts[40:])]:
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in [*part, ""]))
    return LocalFiles(f"{folder}/*.jsonl")


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer(train_bpe(iter(texts), 350), "test")


def make(source, tokenizer, **changes):
    defaults = {"seq_len": 24, "padding": "pack", "eval_tokens": 10**9, "batch_size": 5}
    return EvalSet(source, tokenizer, **{**defaults, **changes})


def kept(batches):
    """The ids of all rows without their pads."""
    return [
        [i for i, label in zip(ids, labels, strict=True) if label != -100]
        for b in batches
        for ids, labels in zip(b.input_ids.tolist(), b.labels.tolist(), strict=True)
    ]


def plain(tokenizer, texts):
    raw = tokenizers.Tokenizer.from_str(tokenizer.json)
    return [[*e.ids, tokenizer.eos_id] for e in raw.encode_batch(texts) if e.ids]


def test_packed_rows_are_all_documents_in_order(source, tokenizer, texts):
    found = kept(make(source, tokenizer))
    assert all(len(row) == 24 for row in found[:-1])
    joined = [i for ids in plain(tokenizer, texts) for i in ids]
    lost = 1 if len(joined) % 24 == 1 else 0  # a last row of one token predicts nothing
    assert [i for row in found for i in row] == joined[: len(joined) - lost]


@pytest.mark.parametrize("holdout", [0, 3])
def test_the_two_halves_share_no_document_and_are_the_whole(source, tokenizer, texts, holdout):
    own = [text for text in texts if not holdout or is_held_out(text, holdout)]
    halves = {
        part: kept(make(source, tokenizer, seq_len=512, padding="truncate_pad", part=part, holdout_every=holdout))
        for part in ("a", "b", "all")
    }
    ids = [row for row in plain(tokenizer, own) if len(row) > 1]
    assert (halves["a"], halves["b"], halves["all"]) == (ids[::2], ids[1::2], ids)


def test_truncated_rows_are_the_documents_in_order(source, tokenizer, texts):
    found = kept(make(source, tokenizer, padding="truncate_pad"))
    assert found == [ids if len(ids) <= 24 else [*ids[:23], tokenizer.eos_id] for ids in plain(tokenizer, texts)]


@pytest.mark.parametrize("group", [2, 128])
def test_best_fit_rows_are_the_pieces_of_all_documents_once(source, tokenizer, texts, group, monkeypatch):
    monkeypatch.setattr(evaluation, "GROUP_ROWS", group)
    found, num_rows = [], 0
    for batch in make(source, tokenizer, padding="best_fit", per_document=True):
        for ids, positions, row in zip(batch.input_ids, batch.positions, batch.labels != -100, strict=True):
            length = int(row.nonzero()[-1]) + 1
            starts = (positions[:length] == 0).nonzero().flatten().tolist()
            found += [tuple(ids[a:b].tolist()) for a, b in zip(starts, [*starts[1:], length], strict=True)]
            num_rows += 1
    documents = plain(tokenizer, texts)
    pieces = [tuple(ids[i : i + 24]) for ids in documents for i in range(0, len(ids), 24)]
    found, pieces = ([piece for piece in some if len(piece) > 1] for some in (found, pieces))  # one token predicts none
    assert sorted(found) == sorted(pieces)
    full = sum(map(len, documents)) / 24
    assert num_rows < (1.1 if group == 128 else 1.5) * full


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
@pytest.mark.parametrize("eval_tokens", [1, 100, 640, 10**9])
def test_rows_stop_at_eval_tokens_or_at_the_end(source, tokenizer, padding, eval_tokens):
    everything = kept(make(source, tokenizer, padding=padding))
    total = sum(len(row) - 1 for row in everything)
    eval_set = make(source, tokenizer, padding=padding, eval_tokens=eval_tokens)
    found = kept(eval_set)
    assert found == everything[: len(found)]
    targets = [len(row) - 1 for row in found]
    assert sum(targets[:-1]) < eval_tokens and (sum(targets) >= eval_tokens or sum(targets) == total)
    assert eval_set.num_targets == sum(targets) and eval_set.exhausted == (sum(targets) < eval_tokens)
    assert make(source, tokenizer, padding=padding, eval_tokens=total).exhausted is False


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(source, tokenizer, padding, world_size):
    whole = list(make(source, tokenizer, padding=padding, eval_tokens=700))
    ranks = [
        list(make(source, tokenizer, padding=padding, eval_tokens=700, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sum(map(len, ranks)) == len(whole) > 3
    for number, batch in enumerate(whole):
        same = ranks[number % world_size][number // world_size]
        assert torch.equal(same.input_ids, batch.input_ids) and torch.equal(same.labels, batch.labels)
        assert same.num_bytes == batch.num_bytes


def test_it_can_be_read_again_and_reads_the_files_once(source, tokenizer, monkeypatch):
    eval_set = make(source, tokenizer)
    first = list(eval_set)
    monkeypatch.setattr(source, "documents", None)
    again = list(eval_set)
    assert len(first) == len(again) == len(eval_set)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))
    assert first[0].input_ids.dtype == first[0].labels.dtype == torch.int64


@pytest.mark.parametrize("padding", ["pack", "truncate_pad"])
def test_the_share_of_a_token_is_that_of_all_rows(source, tokenizer, texts, padding):
    rows = [ids for batch in make(source, tokenizer, padding=padding) for ids in kept([batch])]
    ids = [i for row in rows for i in row]
    token = max(set(ids), key=ids.count)
    assert make(source, tokenizer, padding=padding).share_of(token) == ids.count(token) / len(ids) > 0
    assert make(source, tokenizer, padding=padding).share_of(tokenizer.unk_id) == 0


def test_only_held_out_documents_when_asked(source, tokenizer, texts):
    found = kept(make(source, tokenizer, padding="truncate_pad", seq_len=500, holdout_every=4))
    assert found == plain(tokenizer, [text for text in texts if is_held_out(text, 4)])
    assert len(found) > 10


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
def test_bytes_are_those_of_the_decoded_predicted_tokens(source, tokenizer, padding):
    """Byte-level BPE: a token covers exactly the bytes that its characters spell."""
    raw = tokenizers.Tokenizer.from_str(tokenizer.json)
    for batch in make(source, tokenizer, padding=padding, seq_len=500):
        spelled = [len(raw.id_to_token(i)) for row in kept([batch]) for i in row[1:] if i != tokenizer.eos_id]
        # A character of several bytes belongs to its first token; only a row that begins inside one could differ.
        assert abs(batch.num_bytes - sum(spelled)) <= 3 * len(batch.input_ids)


@pytest.mark.skipif(not T5.exists(), reason="shared data absent")
def test_bytes_of_real_text_with_t5():
    """Untruncated documents: a row covers its text except its first token and white space at the end."""
    files = LocalFiles(f"{SHARED}/c4-en-mini/c4-validation*")
    texts = [d.text for d in files.documents(0)][:40]
    eval_set = make(files, load_tokenizer(str(T5), 32000), padding="truncate_pad", seq_len=8192, batch_size=1)
    raw = tokenizers.Tokenizer.from_file(str(T5))
    for text, batch in zip(texts, eval_set, strict=False):
        first_end = raw.encode(text).offsets[0][1]
        assert batch.num_bytes == len(text[first_end:].rstrip().encode())


def test_wrong_settings_and_empty_text_are_refused(source, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="eval_tokens is 0"):
        make(source, tokenizer, eval_tokens=0)
    with pytest.raises(ValueError, match="truncate_pad, pack or best_fit"):
        make(source, tokenizer, padding="none")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text: every record is blank"):
        list(make(LocalFiles(f"{tmp_path}/a.txt"), tokenizer))
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(DataError, match="no held-out validation documents.*validation_path"):
        list(make(LocalFiles(f"{tmp_path}/a.txt"), tokenizer, holdout_every=10**6))
