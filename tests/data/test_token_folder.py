"""A folder of tokens against the text it was made of: the same rows, the same validation, the same positions."""

import gzip
import json
import random
import signal
import string
import subprocess
import sys
import time
from copy import copy

import numpy as np
import pytest
import torch
from resuming import lines, resumes_bit_for_bit

import sltrain
from sltrain.api.tokenize_slice import Job, Slice, Worker, read_state
from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError
from sltrain.data.evaluation import EvalSet
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.token_folder import TokenFiles
from sltrain.data.tokenizer import Tokenizer

HOLDOUT = 5


def sentence(rng, length):
    return " ".join("".join(rng.choices(string.ascii_lowercase + "é漢", k=rng.randint(1, 6))) for _ in range(length))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of 3,000 and 200 records: blank, damaged and repeated ones among them."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("files")
    for name, size in [("a.json.gz", 3000), ("b.json.gz", 200)]:
        lines = [json.dumps({"text": f"document {i}: {sentence(rng, rng.randint(0, 30))}"}) for i in range(size)]
        lines[7], lines[8], lines[100] = "", "no JSON", lines[99]
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "tokenizer.json").write_text(train_bpe((json.loads(line)["text"] for line in lines[:7]), 350))
    return folder


@pytest.fixture(scope="module")
def tokens(files, tmp_path_factory):
    """The folder made of it by one process, which cuts no shard."""
    return tokenize(files, tmp_path_factory.mktemp("tokens") / "one", processes=1)


def tokenize(files, output, **keys):
    return sltrain.tokenize(
        output,
        data={"name": "local", "path": f"{files}/*.gz", "holdout_every": HOLDOUT},
        tokenizer=f"{files}/tokenizer.json",
        **keys,
    )


def job_of(files, output, **changes):
    """What `tokenize` gives its processes, for a folder that is begun."""
    for name in ("train", "validation", "unfinished"):
        (output / name).mkdir(parents=True)
    tokenizer = Tokenizer((files / "tokenizer.json").read_text(), "test")
    sources = {"train": lambda: LocalFiles(f"{files}/*.gz")}
    return Job(output, sources, lambda: tokenizer, tokenizer.vocab_size, HOLDOUT)


def streams(files, tokens, **changes):
    """The stream of the text and that of the tokens."""
    keys = {"seed": 1, "seq_len": 16, "global_batch_size": 8, "num_streams": 4, "shuffle_block": 50, **changes}
    tokenizer = Tokenizer((files / "tokenizer.json").read_text(), "test", keys.pop("vocab_size", None))
    text = TrainStream(LocalFiles(f"{files}/*.gz"), tokenizer, holdout_every=HOLDOUT, **keys)
    return text, TrainStream(TokenFiles(tokens), tokenizer, **keys)


def positions(batch):
    return {key: at for key, at in batch.state.items() if key != "identity"}


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
def test_rows_and_positions_are_those_of_the_text(files, tokens, padding):
    text, ready = streams(files, tokens, padding=padding)
    for _ in range(500):  # more than an epoch of truncated rows
        ours, theirs = next(ready), next(text)
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
        assert positions(ours) == positions(theirs) and ours.epoch == theirs.epoch
    text.close(), ready.close()
    assert padding != "truncate_pad" or ours.epoch >= 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_run_goes_on_from_any_batch_at_any_number_of_processes(files, tokens, world_size):
    """Stopped twice, on other numbers of processes each time, against the text read in one go."""
    text, _ = streams(files, tokens, padding="pack")
    straight = [next(text).input_ids for _ in range(90)]
    text.close()
    state, found = None, []
    for size in (1, world_size, 4 // world_size * 2):
        ranks = [streams(files, tokens, padding="pack", rank=rank, world_size=size)[1] for rank in range(size)]
        for stream in ranks if state else []:
            stream.load_state_dict(json.loads(state))
        found += [torch.cat([next(stream).input_ids for stream in ranks]) for _ in range(30)]
        state = json.dumps({key: at for stream in ranks for key, at in stream.state_dict().items()})
        for stream in ranks:
            stream.close()
    assert all(map(torch.equal, found, straight))


@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
def test_validation_rows_and_bytes_are_those_of_the_held_out_text(files, tokens, padding):
    keys = {"seq_len": 16, "padding": padding, "eval_tokens": 10**9, "batch_size": 5}
    tokenizer = Tokenizer((files / "tokenizer.json").read_text(), "test")
    text = list(EvalSet(LocalFiles(f"{files}/*.gz"), tokenizer, holdout_every=HOLDOUT, **keys))
    ready = list(EvalSet(TokenFiles(tokens, "validation"), tokenizer, **keys))
    assert len(text) == len(ready) > 20
    for ours, theirs in zip(ready, text, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
        assert ours.num_bytes == theirs.num_bytes


def test_a_corpus_of_its_own_for_validation_is_read_whole(files, tmp_path):
    """With validation_path nothing is held out."""
    output = tokenize(files, tmp_path / "t", processes=1, validation_path=f"{files}/b.json.gz")
    train, validation = TokenFiles(output), TokenFiles(output, "validation")
    assert [[d.index for d in train.documents(shard)] for shard in range(2)] == [
        [i for i in range(size) if i not in (7, 8)] for size in (3000, 200)
    ]
    ours, theirs = list(validation.documents(0)), list(train.documents(1))
    assert [d.ids.tolist() for d in ours] == [d.ids.tolist() for d in theirs]
    assert train.meta.holdout_every == 0


@pytest.mark.parametrize("num_slices", [2, 3])
def test_slices_of_a_shard_join_to_the_shard(files, tokens, tmp_path, num_slices):
    """Documents, from any record on and for any reader, are those of the folder whose shards are whole."""
    output = tmp_path / "t"
    worker = Worker(job_of(files, output), lambda: False)
    for shard in range(2):
        assert all(worker.tokenize(Slice("train", shard, number, num_slices)) for number in range(num_slices))
    meta = json.loads((tokens / "meta.json").read_text())
    meta["train"]["num_slices"] = meta["validation"]["num_slices"] = num_slices
    (output / "meta.json").write_text(json.dumps(meta))
    for part in ("train", "validation"):
        whole, cut = TokenFiles(tokens, part), TokenFiles(output, part)
        for shard, start, wanted in [(0, 0, None), (0, 1500, None), (0, 2047, lambda i: i % 3 == 1), (1, 9, None)]:
            ours, theirs = (
                [(d.index, d.ids.tolist()) for d in f.documents(shard, start, wanted)] for f in (cut, whole)
            )
            assert ours == theirs and ours


def test_a_slice_goes_on_where_it_was_killed(files, tokens, tmp_path):
    """Stopped after every group of documents, with half a group more on the disk than was saved."""
    output, work = tmp_path / "t", Slice("train", 0, 0, 1)
    job = job_of(files, output)
    stops = 0
    while not Worker(job, lambda: True).tokenize(work):
        stops += 1
        for file in output.glob("*/00000-0.*"):
            file.write_bytes(file.read_bytes() + b"half a document")
    assert stops == -(-(3000 - 2) // 256)
    assert read_state(output, work).is_complete
    for file in sorted(output.glob("*/00000-0.*")):
        assert file.read_bytes() == (tokens / file.relative_to(output)).read_bytes()


@pytest.mark.slow
def test_an_interrupt_between_writing_and_counting_leaves_nothing_out(files, tokens, tmp_path, monkeypatch):
    """Ctrl-C with processes=1 comes anywhere, here where the lengths of the files are noted."""
    output, work = tmp_path / "tokens", Slice("train", 0, 0, 1)
    job, times = job_of(files, output), iter([False] * 5 + [True])

    def copy_or_interrupt(written):
        if next(times, False):
            raise KeyboardInterrupt
        return copy(written)

    monkeypatch.setattr("sltrain.api.tokenize_slice.copy", copy_or_interrupt)
    with pytest.raises(KeyboardInterrupt):
        Worker(job, lambda: False).tokenize(work)
    assert 0 < read_state(output, work).next_record < 3000
    assert Worker(job, lambda: False).tokenize(work)
    for name in ("train/00000-0.ids", "train/00000-0.documents", "validation/00000-0.ids"):
        assert (output / name).read_bytes() == (tokens / name).read_bytes()


def test_the_command_is_killed_and_typed_again(files, tokens, tmp_path):
    """kill -9 of the command, whose processes then stop by themselves; typed again it makes the same folder."""
    output = tmp_path / "t"
    command = [
        *(sys.executable, "-m", "sltrain", "tokenize", f"output={output}", "data=local", f"path={files}/*.gz"),
        *(f"tokenizer={files}/tokenizer.json", f"data.holdout_every={HOLDOUT}", "processes=2"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while not list(output.glob("train/*.ids")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # returns when nobody holds its output: no process is left
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in tokens.rglob("*.*"):
        if file.name != "meta.json":
            assert (output / file.relative_to(tokens)).read_bytes() == file.read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_ids_beyond_the_model_become_unk_as_in_text(tmp_path):
    """A literal sentinel, T5's way, in a model with fewer ids than the file."""
    import tokenizers

    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(["<extra_id_0>"])
    whole = Tokenizer(plain.to_str(), "test")
    ids = np.array([2, 3, 2, 2, 0], np.uint16)
    few = Tokenizer(plain.to_str(), "test", vocab_size=3)
    assert whole.refit(ids).tolist() == [2, 3, 2, 2, 0]
    assert few.refit(ids).tolist() == [2, 1, 2, 2, 0]
    assert few.refit(ids, 3).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="id 9 is none"):
        few.refit(np.array([9], np.uint16))


def test_what_is_wrong_with_a_folder_is_named(files, tokens, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "unfinished").mkdir(parents=True)
    for folder, words in [("nowhere", "does not exist"), ("empty", "no meta.json"), ("begun", "is not finished")]:
        with pytest.raises(ValueError, match=words):
            TokenFiles(tmp_path / folder)
    meta = json.loads((tokens / "meta.json").read_text())
    for content, words in [("{", "damaged"), ({**meta, "format_version": 2}, "format version 2"), ({}, "damaged")]:
        (tmp_path / "empty" / "meta.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=words):
            TokenFiles(tmp_path / "empty")
    other = Tokenizer(train_bpe(iter(["something else"]), 300), "other")
    with pytest.raises(ValueError, match="not made with this tokenizer; leave tokenizer out"):
        TokenFiles(tokens).check_tokenizer(other)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_files_are_found_before_training(files, tokens, tmp_path, damage):
    import shutil

    copy = shutil.copytree(tokens, tmp_path / "copy")
    file = copy / "train" / "00000-0.ids"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-2])
    elif damage == "changed":
        content[100] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(DataError, match=r"00000-0\.ids is damaged"):
        TokenFiles(copy).check()
    with pytest.raises(sltrain.Error, match=r"00000-0\.ids is damaged"):
        tokenize(files, copy, processes=1)


def test_another_corpus_or_tokenizer_does_not_go_into_a_folder(files, tokens, tmp_path):
    output = tmp_path / "t"
    job_of(files, output)
    plan = {"source_fingerprint": "another", "validation_fingerprint": None, "tokenizer_sha256": "", "eos_id": 0}
    (output / "unfinished" / "plan.json").write_text(json.dumps({**plan, "holdout_every": 5, "num_slices": {}}))
    with pytest.raises(sltrain.Error, match="begun with another source fingerprint: another"):
        tokenize(files, output, processes=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(sltrain.Error, match="holds something else"):
        tokenize(files, tmp_path / "mine", processes=1)
    with pytest.raises(sltrain.Error, match="data=tokens is made of ids already"):
        sltrain.tokenize(output, data="tokens", path=str(tokens))
    with pytest.raises(sltrain.Error, match="not of"):
        sltrain.tokenize(tokens, data="local", path=f"{files}/b.json.gz", processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["pack", "truncate_pad", "best_fit"])
def test_a_run_is_that_of_the_text_and_resumes_bit_for_bit(tiny, sltrain_train, tmp_path, padding):
    """The same losses as from text, of training and validation; stopped after updates 2 and 5 too."""
    output = tmp_path / "tokens"
    text = [*tiny, f"padding={padding}"]
    sltrain.tokenize(output, processes=1, overrides=text)
    code, _, err = sltrain_train(*text, f"run_dir={tmp_path / 'text'}", "checkpoint_every=0")
    assert code == 0, err
    ready = [key for key in text if not key.startswith(("data=", "path=", "tokenizer=", "data.holdout_every="))]
    ready += ["data=tokens", f"path={output}"]
    resumes_bit_for_bit(ready, sltrain_train, tmp_path, at=(2, 5))
    assert lines(tmp_path / "straight") == lines(tmp_path / "text")
    assert sltrain.evaluate(tmp_path / "straight") == sltrain.evaluate(tmp_path / "text")
