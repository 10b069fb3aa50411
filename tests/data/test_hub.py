"""The Hub as a source, against a server on this machine that is laid out like it and fails on demand."""

import gzip
import json
import os
import random
import re
import socket
import string
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sltrain.data.bpe import train_bpe
from sltrain.data.documents import DataError, NetworkError
from sltrain.data.hub import HubFiles, RetryPolicy
from sltrain.data.sources.local import LocalFiles
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = "en/c4-train.{shard:05d}-of-{num_shards:05d}.json.gz"
QUICK = RetryPolicy(retries=4, first_wait=0.01, max_wait=0.05, timeout=0.3, range_bytes=20_000)
NUM_SHARDS = 2


class Hub(ThreadingHTTPServer):
    """Files by path; `faults` are used up one a request: a status, "cut" (half the answer), "stall" (then silence)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.faults, self.ranges, self.bytes_sent = {}, [], [], 0
        self.knows_ranges, self.redirects = True, False
        self.released = threading.Event()  # ends the stalled answers
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is part of these tests."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        if hub.redirects and not self.path.startswith("/cdn"):
            return self.answer(302, [("Location", "/cdn" + self.path)])
        match = re.fullmatch(rf"(?:/cdn)?/(?:datasets/)?([^/]+/[^/]+)/resolve/(?:{REVISION}|main)/(.+)", self.path)
        data = hub.files.get(match.groups()) if match else None
        if data is None:
            code = "EntryNotFound" if match and any(repo == match[1] for repo, _ in hub.files) else "RepoNotFound"
            return self.answer(404, [("X-Error-Code", code)])
        fault = hub.faults.pop(0) if hub.faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self.answer(fault, [])
        first, last = 0, len(data) - 1
        if hub.knows_ranges and (wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            first, last = int(wanted[1]), min(int(wanted[2]), last)
            hub.ranges.append((first, last))
        extent = [("Content-Range", f"bytes {first}-{last}/{len(data)}")] if hub.ranges else []
        part = data[first : last + 1]
        self.answer(206 if extent else 200, [*extent, ("ETag", '"1"'), ("X-Repo-Commit", REVISION)], part, fault)

    def answer(self, status, headers, body=b"", fault=None):
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[: len(body) // 2] if fault else body
        self.server.bytes_sent += len(body)  # before the client can have seen them
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait(20)
        if fault:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_url",
        lambda repo, file, repo_type, revision: f"{server.url}/{repo_type}s/{repo}/resolve/{revision}/{file}",
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [f"{i} " + "".join(rng.choices(string.ascii_lowercase + " ", k=600)) for i in range(300)]


@pytest.fixture
def shards(hub, texts):
    """The corpus on the server: file name -> bytes of about 60 kB, three ranges."""
    found = {}
    for shard in range(NUM_SHARDS):
        lines = "".join(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in texts[shard::2])
        found[TEMPLATE.format(shard=shard, num_shards=NUM_SHARDS)] = gzip.compress(lines.encode())
    hub.files.update({("allenai/c4", name): data for name, data in found.items()})
    return found


def make(**changes):
    return HubFiles("allenai/c4", REVISION, TEMPLATE, NUM_SHARDS, **{"retry": QUICK, **changes})


def read(source, shard=0):
    return [d.text for d in source.documents(shard)]


def test_shards_are_read_in_ranges(hub, shards, texts):
    source = make()
    source.check()
    hub.ranges.clear()
    assert read(source, 1) == texts[1::2]
    size = len(shards[source.files[1]])
    assert hub.ranges == [(first, min(first + 20_000, size) - 1) for first in range(0, size, 20_000)]
    assert [d.index for d in source.documents(0, start=10, step=3, offset=1)] == list(range(10, 150, 3))


@pytest.mark.parametrize("redirects", [False, True])
@pytest.mark.parametrize(
    "faults",
    [
        ["cut"],
        ["cut", "cut", None, "cut", "cut"],
        [503, 503],
        [None, 429, 500],
        ["stall"],
        [None, "stall", 503, "cut"],
    ],
)
def test_a_broken_connection_is_resumed_and_nothing_is_lost(hub, shards, texts, faults, redirects, lines):
    hub.redirects = redirects
    hub.faults += faults
    assert read(make()) == texts[0::2]
    assert len(lines) == sum(fault is not None for fault in faults) and "retry 1 of 4 in 0.01 s from byte" in lines[0]
    assert hub.bytes_sent == len(shards[make().files[0]])  # no byte twice


def test_a_server_without_ranges_is_read_as_well(hub, shards, texts):
    hub.knows_ranges = False
    hub.faults += ["cut"]
    assert read(make()) == texts[0::2]


def test_a_dead_network_is_given_up_after_the_retries(hub, shards, texts, lines):
    hub.faults += [None, *[503] * 100]
    found = []
    with pytest.raises(NetworkError, match="gave up after 5 attempts.*503"):
        for document in make().documents(0):
            found.append(document.text)
    assert 10 < len(found) < 150 and found == texts[0 : 2 * len(found) : 2]
    assert len(lines) == QUICK.retries
    hub.faults.clear()  # and when it is back, the next attempt begins after the last good record
    assert found + [d.text for d in make().documents(0, start=len(found))] == texts[0::2]


def test_an_unreachable_hub_is_reported_at_the_start(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *args, **kwargs: url)
    with pytest.raises(NetworkError, match=rf"cannot reach {url}.*data=local"):
        make().check()


def test_a_silent_hub_is_reported_at_the_start(hub, shards):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.MonkeyPatch.context() as patch:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
            patch.setattr("huggingface_hub.hf_hub_url", lambda *args, **kwargs: address)
            with pytest.raises(NetworkError, match="cannot reach"):
                make().check()


def test_what_the_hub_does_not_have_is_an_error_without_retries(hub, shards, lines):
    source = HubFiles("allenai/c4", REVISION, "nl/{shard}.json.gz", 4, retry=QUICK)
    for action in (source.check, lambda: read(source)):
        with pytest.raises(DataError, match=r"no such file or revision \(HTTP 404\)"):
            action()
    assert not lines


def test_wrong_templates_are_refused():
    with pytest.raises(ValueError, match="not a file template"):
        HubFiles("a/b", REVISION, "{name}.json.gz", 1)
    with pytest.raises(ValueError, match="parquet"):
        HubFiles("a/b", REVISION, "{shard}.parquet", 1)
    with pytest.raises(ValueError, match="at least 1"):
        HubFiles("a/b", REVISION, "{shard}.json.gz", 0)


def test_a_damaged_shard_follows_the_rule_for_local_files(hub, shards, texts, lines):
    name = next(iter(shards))
    hub.files["allenai/c4", name] = shards[name][:30_000]
    source = make()
    found = read(source)
    assert found == texts[0 : 2 * len(found) : 2] and 10 < len(found) < 150
    assert len(lines) == 1 and f"allenai/c4/{name} is damaged after its record {len(found)}" in lines[0]
    with pytest.raises(DataError, match="is damaged"):
        read(make(on_bad_data="stop"))


def test_training_rows_from_a_failing_hub_are_those_of_the_same_files_here(hub, shards, texts, tmp_path):
    for name, data in shards.items():
        (tmp_path / os.path.basename(name)).write_bytes(data)
    tokenizer = Tokenizer(train_bpe(iter(texts[:50]), 300), "test")

    def rows(source, faults=()):
        stream = TrainStream(
            source, tokenizer, seed=3, seq_len=64, padding="pack", global_batch_size=8, shuffle_block=16,
        )  # fmt: skip
        hub.faults[:] = faults
        found = [next(stream).input_ids.tolist() for _ in range(60)]
        stream.close()
        return found

    assert rows(make(), ["cut", None, 503, "stall", None, None, "cut"] * 3) == rows(LocalFiles(f"{tmp_path}/*.gz"))


def run(code, endpoint, tmp_path):
    """Run code in a fresh process, because huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PROGRAM = f"""
import sys
from sltrain.data.hub import HubFiles, RetryPolicy
from sltrain.data.tokenizer import load_tokenizer
assert not {{"huggingface_hub", "datasets", "pyarrow"}} & set(sys.modules)
def attempt(action):
    try:
        print(action())
    except (ValueError, ConnectionError) as error:
        print(type(error).__name__, error)
source = HubFiles("allenai/c4", "{REVISION}", "{TEMPLATE}", {NUM_SHARDS}, retry=RetryPolicy(first_wait=0.01, timeout=2))
attempt(source.check)
attempt(lambda: sum(len(d.text) for shard in range(2) for d in source.documents(shard)))
attempt(lambda: load_tokenizer("t5-tiny").vocab_size)
attempt(lambda: load_tokenizer("some/other").vocab_size)
attempt(lambda: load_tokenizer("allenai/c4").vocab_size)
"""


def test_the_real_client_finds_its_way_with_hf_endpoint(hub, shards, texts, tmp_path):
    hub.files["google-t5/t5-tiny", "tokenizer.json"] = train_bpe(iter(texts[:50]), 300).encode()
    found = run(PROGRAM, hub.url, tmp_path)
    assert found[:3] == ["None", str(sum(map(len, texts))), "300"]
    for line in found[3:]:
        assert line.startswith("ValueError") and "neither a file here nor a repository with a tokenizer.json" in line
    hub.close()
    program = "from sltrain.data.tokenizer import load_tokenizer\nprint(load_tokenizer('t5-tiny').vocab_size)"
    assert run(program, hub.url, tmp_path) == ["300"]  # from the cache


def test_without_a_network_every_request_fails_with_one_line(tmp_path):
    program = PROGRAM.replace("attempt(lambda: sum", "0 and attempt(lambda: sum")
    found = run(program, "http://127.0.0.1:9", tmp_path)
    assert found[0].startswith("NetworkError cannot reach http://127.0.0.1:9/datasets/allenai/c4/resolve/")
    assert len(found) == 4
    assert all(
        line.startswith("NetworkError") and "cannot reach" in line and "tokenizer=bpe:" in line for line in found[1:]
    )


def test_a_run_that_loses_the_hub_saves_and_continues_where_it_was(
    hub, texts, tiny, tokenizer_file, tmp_path, sltrain_train, metrics_of, monkeypatch
):
    """The whole command: exit code 4 with a checkpoint, then, with the Hub back, the log of an undisturbed run."""
    monkeypatch.setattr("sltrain.data.hub.DEFAULT_RETRY", RetryPolicy(2, 0.01, 0.02, timeout=0.3, range_bytes=4_000))
    for kind in ("train", "validation"):
        for shard in range(NUM_SHARDS):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[shard::NUM_SHARDS])
            name = TEMPLATE.replace("train", kind).format(shard=shard, num_shards=NUM_SHARDS)
            hub.files["allenai/c4", name] = gzip.compress(lines.encode())
    recipe = [
        *(override for override in tiny if not override.startswith(("data=", "path="))),
        *("data=c4", f"data.revision={REVISION}", "data.num_train_shards=2", "data.num_validation_shards=2"),
        *("data.num_streams=2", "data.shuffle_block=8", "max_steps=30", "data.holdout_every=100"),
    ]
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/straight")[0] == 0

    hub.faults += [None] * (len(hub.ranges) * 2 // 3) + [503] * 10_000
    code, out, err = sltrain_train(*recipe, f"run_dir={tmp_path}/run")
    assert code == 4
    assert "gave up after 3 attempts" in err and f"run_dir={tmp_path}/run" in out
    assert 0 < metrics_of(tmp_path / "run")[-1]["step"] < 30

    hub.faults.clear()
    assert sltrain_train(*recipe, f"run_dir={tmp_path}/run")[0] == 0
    lost, straight = (
        [(line["step"], line["loss"]) for line in metrics_of(tmp_path / name) if "loss" in line]
        for name in ("run", "straight")
    )
    assert lost == straight
