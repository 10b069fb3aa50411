"""What several test files share: a small real corpus, a tokenizer trained on it, the command run in process or as a
process, and processes that talk over gloo."""

import gzip
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side on small tensors; torch reads it on import

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from faults.hooks import heed_signals  # noqa: E402

heed_signals()  # before tests send some to processes that they start

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the checkout; tests that need it are skipped without."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder of shared data beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four C4-style shards of real text (pieces of the standard library's source), 240 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [
        file.read_text(errors="ignore")[start : start + 1500] for file in files[:60] for start in (0, 1500, 3000, 4500)
    ]
    texts = [text for text in texts if len(text) > 200]
    for shard in range(4):
        with gzip.open(folder / f"train.{shard:05d}.json.gz", "wt") as out:
            for text in texts[shard::4]:
                out.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(corpus: Path) -> Path:
    """A byte-level BPE of 512 pieces."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = [json.loads(line)["text"] for file in sorted(corpus.glob("*.gz")) for line in gzip.open(file, "rt")]
    tokenizer.train_from_iterator(texts, vocab_size=512, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    path = corpus / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny(corpus: Path, tokenizer_file: Path) -> list[str]:
    """Overrides of a run that takes a second: a two-layer model on the small corpus."""
    return [
        "model=llama_tiny",
        "model.hidden_size=32",
        "model.intermediate_size=64",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "rank=8",
        "data=local",
        f"path={corpus}/*.json.gz",
        f"tokenizer={tokenizer_file}",
        "data.shuffle_block=16",
        "data.holdout_every=10",
        "seq_len=32",
        "global_batch_size=8",
        "micro_batch_size=4",
        "max_steps=6",
        "warmup_steps=2",
        "log_every=1",
        "eval_every=0",
        "eval_tokens=500",
        "device=cpu",
    ]


class _ListHandler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the package tells its user during the test, from any thread."""
    logger, said = logging.getLogger("sltrain"), list[str]()
    handler = _ListHandler(said)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def sltrain_train(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `sltrain-train` in this process: overrides -> (exit code, stdout, stderr)."""
    from sltrain.commands.train import run_command

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sltrain-train", *arguments])
        capfd.readouterr()
        code = run_command(list(arguments))
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


@pytest.fixture
def start_process() -> Callable[..., "subprocess.Popen[str]"]:
    """Start `python -m sltrain.train` (or torchrun, with `num_ranks`) as a process with piped output."""
    started = []

    def start(*arguments: str, num_ranks: int = 1, **environment: str) -> "subprocess.Popen[str]":
        launcher = [sys.executable]
        if num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        process = subprocess.Popen(
            [*launcher, "-m", "sltrain.train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict]]:
    """The lines of a run's metrics.jsonl."""
    return lambda run_dir: [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


class Forked:
    """`sltrain-train` in forked children of this process, one a rank: as separate as processes that torchrun starts,
    without seconds of imports. It has the methods of Popen that tests use."""

    def __init__(self, arguments: tuple[str, ...], num_ranks: int, environment: dict[str, str], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.files = [folder / "out", folder / "err"]
        ranks = {
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        self.children = []
        for rank in range(num_ranks):
            own = ranks | {"RANK": rank, "LOCAL_RANK": rank} if num_ranks > 1 else {}
            child = multiprocessing.get_context("fork").Process(
                target=self._work, args=(arguments, environment | {key: str(value) for key, value in own.items()})
            )
            child.start()
            self.children.append(child)
        self.pid = self.children[0].pid

    def _work(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        torch.set_num_threads(1)  # a forked OpenMP pool would never answer
        os.environ.update(environment, TOKENIZERS_PARALLELISM="false")  # nor would that library's threads
        for number, file in enumerate(self.files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        from sltrain.commands.train import main

        sys.argv = ["sltrain-train", *arguments]
        main()

    @property
    def returncode(self) -> int | None:
        """That of the first rank that failed; 0 if none did, None while one runs."""
        codes = [child.exitcode for child in self.children]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        for child in self.children:
            child.join(timeout)
        assert self.returncode is not None, "still running"
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text() for file in self.files)
        return out, err

    def send_signal(self, number: int) -> None:
        for child in self.children:
            os.kill(child.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@pytest.fixture
def fork_train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Start `sltrain-train` in forked children: overrides, num_ranks and environment -> Forked."""
    import sltrain.building.run  # noqa: F401  once, not in every child

    started = []

    def start(*arguments: str, num_ranks: int = 1, **environment: str) -> Forked:
        started.append(Forked(arguments, num_ranks, environment, tmp_path_factory.mktemp("forked")))
        return started[-1]

    yield start
    for forked in started:
        for child in forked.children:
            child.kill()
            child.join()


def _run_in_child(function: Callable[[], None]) -> int:
    """Run `function` in a forked child and return its pid. A child that raises ends with code 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # a forked OpenMP pool would never answer
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


@pytest.fixture(scope="session")
def in_child() -> Callable[[Callable[[], None]], int]:
    """Runs a function in a forked child and gives its pid."""
    return _run_in_child


@contextmanager
def group_of(store: Path, rank: int, world_size: int = 2) -> Iterator[Any]:
    from sltrain.engine.distributed import Ranks

    late = timedelta(seconds=60)  # ranks that wait for each other fail, and do not hang
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=late)
    try:
        yield Ranks(rank, world_size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def on_two_ranks(in_child: Callable[[Callable[[], None]], int], tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a function on two gloo ranks, or more, and gives what it returned on each."""

    def run(function: Callable[[Any], Any], world_size: int = 2) -> list[Any]:
        def of_rank(rank: int) -> Callable[[], None]:
            def work() -> None:
                with group_of(tmp_path / "store", rank, world_size) as ranks:
                    torch.save(function(ranks), tmp_path / f"{rank}.pt")

            return work

        children = [in_child(of_rank(rank)) for rank in range(world_size)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run
