"""data=c4 against a server on this machine that answers as the Hub does and fails on demand."""

import gzip
import json
import os
import random
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback_hub import REVISION, Hub, hub  # noqa: F401  (a fixture)

from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, NetworkError
from sltrain.data.download import RetryPolicy
from sltrain.data.order import deal_slices, slice_order
from sltrain.data.sources.c4 import HubShards
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer

TEMPLATE = "en/c4-train.{shard:05d}-of-{num_shards:05d}.json.gz"
QUICK = RetryPolicy(retries=4, first_wait=0.01, max_wait=0.05, timeout=0.3)
NUM_SHARDS = 4


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [f"{i} " + "".join(rng.choices(string.ascii_lowercase + " ", k=600)) for i in range(300)]


@pytest.fixture
def shards(hub, texts):  # noqa: F811
    """The corpus on the server: file name -> bytes, about 30 kB."""
    found = {}
    for shard in range(NUM_SHARDS):
        lines = "".join(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in texts[shard::4])
        found[TEMPLATE.format(shard=shard, num_shards=NUM_SHARDS)] = gzip.compress(lines.encode())
    hub.files.update({("allenai/c4", name): data for name, data in found.items()})
    return found


def make(**changes):
    return HubShards("allenai/c4", REVISION, TEMPLATE, NUM_SHARDS, **{"retry": QUICK, **changes})


def read(source, shard=0):
    return [d.text for d in source.documents(shard)]


def until(condition):
    """Wait for a thread of this process."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def cached(tmp_path):
    """Names of the shards in the Hub's cache, and how many other files there are with content."""
    folder = tmp_path / "hf" / "hub" / "datasets--allenai--c4"
    return sorted(path.name for path in (folder / "snapshots").rglob("*.gz")), len(list(folder.glob("blobs/*")))


@pytest.mark.parametrize(
    ("faults", "is_resumed"), [(["cut", "stall"], True), ([503, 429, 500], True), (["cut", 503], False)]
)
def test_a_failing_download_is_resumed_and_nothing_is_lost(hub, shards, texts, faults, is_resumed):  # noqa: F811
    hub.faults += faults
    source = make()
    assert read(source) == texts[0::4]
    sent, size = sum(count for _, _, count in hub.sent), len(shards[source.files[0]])
    assert (sent < size + 3000) is is_resumed
    hub.sent.clear()
    assert read(make()) == texts[0::4] and not hub.sent  # it is in the cache


def test_a_dead_network_is_given_up_after_the_retries_and_tried_again_later(hub, shards, texts, lines):  # noqa: F811
    source = make()
    hub.broken.add(source.files[0])
    with pytest.raises(NetworkError, match="cannot reach allenai/c4/en/.*answered 503; gave up after 5 attempts"):
        read(source)
    assert len(lines) == QUICK.retries and "retry 1 of 4 in 0.01 s" in lines[0]
    source.expect(0)
    assert until(lambda: source.downloads._running[source.files[0]].done())
    hub.broken.clear()
    assert read(source) == texts[0::4]


@pytest.mark.parametrize("listens", [False, True])
def test_an_unreachable_or_silent_hub_is_reported_at_the_start(monkeypatch, hub, listens):  # noqa: F811
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{filename}")
        with pytest.raises(
            NetworkError,
            match=r"cannot reach allenai/c4/en/.* on the Hub: (ConnectionRefused|Timeout)Error.*data=local",
        ):
            make().check()


def test_what_the_hub_does_not_have_is_an_error_without_retries(hub, shards, lines):  # noqa: F811
    hub.files["some/gated", "0.json.gz"] = hub.files["some/private", "0.json.gz"] = b""
    hub.private.update({"some/gated": "GatedRepo", "some/private": "RepoNotFound"})
    for repo, revision, template, words in [
        ("allenai/c4", REVISION, "nl/{shard}.json.gz", "there is no such file"),
        ("allenai/c4", "f" * 40, TEMPLATE, "there is no such revision"),
        ("allenai/nothing", REVISION, TEMPLATE, "no such repository, or it is private.*log in"),
        ("some/private", REVISION, "{shard}.json.gz", "no such repository, or it is private.*log in"),
        ("some/gated", REVISION, "{shard}.json.gz", "access is gated; accept its terms"),
        ("no name", REVISION, TEMPLATE, "not the name of a repository"),
    ]:
        source = HubShards(repo, revision, template, 4, retry=QUICK)
        for action in (source.check, lambda source=source: read(source)):
            with pytest.raises(DataError, match=words):
                action()
    assert not lines


def test_a_cache_that_cannot_be_written_is_no_lost_network(hub, shards, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{tmp_path}/file/hub")
    with pytest.raises(DataError, match="the Hub's cache cannot hold it .*HF_HOME"):
        read(make())


def test_the_fingerprint_is_the_one_that_checkpoints_hold():
    assert make().fingerprint() == f"allenai/c4@{REVISION}, 4 shards, first en/c4-train.00000-of-00004.json.gz"


def test_wrong_templates_are_refused():
    with pytest.raises(ValueError, match="not a file template"):
        HubShards("a/b", REVISION, "{name}.json.gz", 1)
    with pytest.raises(ValueError, match="at least 1"):
        HubShards("a/b", REVISION, "{shard}.json.gz", 0)


def test_a_damaged_shard_follows_the_rule_for_local_files(hub, shards, texts, lines):  # noqa: F811
    name = next(iter(shards))
    hub.files["allenai/c4", name] = shards[name][:15_000]
    found = read(make())
    assert found == texts[0 : 4 * len(found) : 4] and 10 < len(found) < 75
    assert len(lines) == 1 and f"allenai/c4/{name} is damaged after its record {len(found)}" in lines[0]
    with pytest.raises(DataError, match="is damaged"):
        read(make(on_bad_data="stop"))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer(train_bpe(iter(texts[:50]), 300), "test")


def stream_of(source, tokenizer, **changes):
    shape = {"seed": 3, "seq_len": 64, "padding": "pack", "global_batch_size": 4, "num_streams": 2, "prefetch": 1}
    return TrainStream(source, tokenizer, **{**shape, "shuffle_block": 16, **changes})


def test_training_rows_from_a_failing_hub_are_those_of_the_same_files_here(
    hub,  # noqa: F811
    shards,
    tokenizer,
    tmp_path,
):
    folder = tmp_path / "here"
    folder.mkdir()
    for name, data in shards.items():
        (folder / os.path.basename(name)).write_bytes(data)

    def rows(source):
        stream = stream_of(source, tokenizer)
        found = [next(stream).input_ids.tolist() for _ in range(700)]  # more than an epoch
        stream.close()
        return found

    files = LocalFiles(f"{folder}/*.gz")
    files.shard_sizes = lambda: [1] * 4
    hub.faults += [503, "cut", None, 429]
    assert rows(make()) == rows(files)
    assert len({path for path, _, _ in hub.sent}) == NUM_SHARDS


def test_the_next_shard_of_every_stream_is_fetched_ahead(hub, shards, tokenizer, tmp_path):  # noqa: F811
    stream = stream_of(make(), tokenizer)
    next(stream)
    assert until(lambda: cached(tmp_path) == (sorted(map(os.path.basename, shards)), NUM_SHARDS))
    stream.close()
    assert len(hub.sent) == NUM_SHARDS  # two streams read two shards each, one after the other


def test_a_shard_is_deleted_after_use_on_request(hub, shards, texts, tmp_path):  # noqa: F811
    source = make(delete_after_use=True)
    documents = source.documents(0)
    next(documents)
    source.expect(1)
    assert until(lambda: len(cached(tmp_path)[0]) == 2)
    assert [d.text for d in documents] == texts[4::4]
    assert cached(tmp_path) == ([os.path.basename(source.files[1])], 1)
    list(source.documents(1, 0, lambda index: index % 2 == 1))  # other streams need the other half
    source.expect(1)
    assert read(source, 1) == texts[1::4]
    assert cached(tmp_path) == ([], 0)


def test_a_shard_that_another_rank_reads_too_is_not_deleted(hub, shards, tokenizer):  # noqa: F811
    """Four ranks share two streams, so a shard that one has read may be one that another is about to open."""
    for world_size, are_kept in ((2, False), (4, True)):
        stream = stream_of(make(delete_after_use=True), tokenizer, world_size=world_size)
        hub.sent.clear()
        while next(stream).epoch < 2:
            pass
        stream.close()
        assert (len(hub.sent) <= 2) == are_kept  # this rank's stream reads two shards an epoch


def run(code, endpoint, tmp_path):
    """Run code in a fresh process, because huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PROGRAM = f"""
import sys
from sltrain.data.download import RetryPolicy
from sltrain.data.sources.c4 import HubShards
from sltrain.data.load_tokenizer import load_tokenizer
assert not {{"huggingface_hub", "datasets", "pyarrow"}} & set(sys.modules)
def attempt(action):
    try:
        print(action())
    except (ValueError, ConnectionError) as error:
        print(type(error).__name__, error)
retry = RetryPolicy(first_wait=0.01, timeout=2)
source = HubShards("allenai/c4", "{REVISION}", "{TEMPLATE}", {NUM_SHARDS}, retry=retry)
attempt(source.check)
attempt(lambda: sum(len(d.text) for shard in range({NUM_SHARDS}) for d in source.documents(shard)))
attempt(lambda: load_tokenizer("t5-tiny").vocab_size)
attempt(lambda: load_tokenizer("some/other").vocab_size)
attempt(lambda: load_tokenizer("allenai/c4").vocab_size)
"""


def test_the_real_client_finds_its_way_with_hf_endpoint(hub, shards, texts, tmp_path):  # noqa: F811
    hub.files["google-t5/t5-tiny", "tokenizer.json"] = train_bpe(iter(texts[:50]), 300).encode()
    found = run(PROGRAM, hub.url, tmp_path)
    assert found[:3] == ["None", str(sum(map(len, texts))), "300"]
    for line in found[3:]:
        assert line.startswith("ValueError") and "neither a file here nor a repository with a tokenizer.json" in line
    hub.close()
    again = PROGRAM.partition('attempt(lambda: load_tokenizer("some')[0]
    assert run(again, hub.url, tmp_path) == found[:3]  # from the cache


def test_a_tokenizer_comes_with_its_configuration(hub, texts, tmp_path):  # noqa: F811
    """Else its end of texts would depend on what else has filled the cache, and differ from machine to machine."""
    hub.files["google-t5/t5-tiny", "tokenizer.json"] = train_bpe(iter(texts[:50]), 300).encode()
    hub.files["google-t5/t5-tiny", "tokenizer_config.json"] = b'{"eos_token": "<unk>"}'
    program = """
from sltrain.data.load_tokenizer import load_tokenizer
print(load_tokenizer("t5-tiny").special_tokens()["eos_token"])
"""
    assert run(program, hub.url, tmp_path) == ["<unk>"]
    hub.close()
    assert run(program, hub.url, tmp_path) == ["<unk>"]  # from the cache


def test_without_a_network_every_request_fails_with_one_line(tmp_path):
    program = PROGRAM.replace("attempt(lambda: sum", "0 and attempt(lambda: sum")
    found = run(program, "http://127.0.0.1:9", tmp_path)
    assert found[0].startswith("NetworkError cannot reach allenai/c4/en/")
    assert len(found) == 4
    assert all(
        line.startswith("NetworkError") and "cannot reach" in line and "tokenizer=bpe:" in line for line in found[1:]
    )


def test_no_half_file_is_left_when_the_process_ends_during_a_download(hub, shards, tmp_path):  # noqa: F811
    hub.files["allenai/c4", "big/0.json.gz"] = bytes(200 << 20)
    program = f"""
import glob, time
from sltrain.data.download import Downloads
downloads = Downloads("allenai/c4", "{REVISION}")
downloads.start("big/0.json.gz")
while not glob.glob("{tmp_path}/hf/hub/datasets--allenai--c4/blobs/*"): time.sleep(0.001)
"""
    assert run(program, hub.url, tmp_path) == []
    assert not list(Path(tmp_path).glob("hf/hub/datasets--allenai--c4/blobs/*"))


def test_a_run_that_loses_the_hub_saves_and_continues_where_it_was(
    hub,  # noqa: F811
    shards,
    texts,
    tiny,
    tmp_path,
    sltrain_train,
    metrics_of,
    monkeypatch,
):
    """The whole command: exit code 4 with a checkpoint, then, with the Hub back, the log of an undisturbed run."""
    monkeypatch.setattr("sltrain.data.sources.c4.DEFAULT_RETRY", RetryPolicy(2, 0.01, 0.02, timeout=2))
    held_out = "".join(json.dumps({"text": text}) + "\n" for text in texts[:40])
    name = TEMPLATE.replace("train", "validation").format(shard=0, num_shards=1)
    hub.files["allenai/c4", name] = gzip.compress(held_out.encode())
    recipe = [
        *(override for override in tiny if not override.startswith(("data=", "path="))),
        *("data=c4", f"data.revision={REVISION}", "data.num_train_shards=4", "data.num_validation_shards=1"),
        *("data.num_streams=2", "data.shuffle_block=8", "max_steps=30", "data.holdout_every=100"),
    ]
    dealt = deal_slices([1] * 4, 2, 42)
    second = [slice_order(slices, 42, 0, stream)[1].shard for stream, slices in enumerate(dealt)]
    hub.broken.update(list(shards)[shard] for shard in second)
    code, out, err = sltrain_train(*recipe, f"run_dir={tmp_path}/run")
    assert code == 4
    assert "gave up after 3 attempts" in err and f"run_dir={tmp_path}/run" in out
    assert 0 < metrics_of(tmp_path / "run")[-1]["step"] < 30

    hub.broken.clear()
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/run")[0] == 0
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/straight")[0] == 0
    lost, straight = (
        [(line["step"], line["loss"]) for line in metrics_of(tmp_path / name) if "loss" in line]
        for name in ("run", "straight")
    )
    assert lost == straight
