"""`import sltrain`: what it offers, that its examples run, and that it trains as the command does."""

import contextlib
import doctest
import inspect
import io
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sltrain
from sltrain.api import public
from sltrain.api.overrides import as_overrides
from sltrain.compose import TRAIN, compose_config, parse_overrides

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ("train", "plan", "load", "generate", "evaluate", "export", "report", "bench")
TINY: dict[str, Any] = {
    "data": "stdlib",
    "tokenizer": "bpe:512",
    "seq_len": 32,
    "max_steps": 3,
    "warmup_steps": 1,
    "global_batch_size": 4,
    "micro_batch_size": 4,
    "eval_tokens": 500,
    "device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where relative paths are. It has a finished run, outputs/example."""
    made = tmp_path_factory.mktemp("library")
    with contextlib.chdir(made), contextlib.redirect_stdout(io.StringIO()):
        sltrain.train("llama_tiny", run_dir="outputs/example", **TINY)
        yield made


def test_importing_it_costs_no_torch() -> None:
    code = "import sys, sltrain; sltrain.Error, sltrain.Method, sltrain.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_name_is_there_and_known_to_type_checkers() -> None:
    names = {name for part in sltrain.PUBLIC.values() for name in part.split()}
    assert {*FUNCTIONS, "Run", "SLTrainLinear", "replace_linears", "merge_to_dense", "Method", "METHODS"} <= names
    for name in names:
        assert getattr(sltrain, name).__doc__
    source = inspect.getsource(sltrain)
    assert {line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from sltrain")} == names
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = sltrain.tarin  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Run", *FUNCTIONS])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    if name == "train":  # it makes its own
        monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(public, name), name, globs={})
    assert example.examples, "it shows how it is called"
    example.globs = {"sltrain": sltrain, "torch": torch}
    if name == "export":
        monkeypatch.chdir(folder)
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=output.write)
    assert runner.failures == 0, output.getvalue()


def test_the_function_is_there_after_import_of_the_module_too() -> None:
    code = """
        import inspect, sys
        import sltrain
        first = sltrain.train
        import sltrain.train
        from sltrain import train
        assert train is sltrain.train is sys.modules["sltrain.train"]
        assert inspect.signature(train) == inspect.signature(first)
        for call in (first, train):
            try:
                call("lama_60m", data="stdlib")
            except sltrain.Error as error:
                print(error)
    """
    command = [sys.executable, "-c", inspect.cleandoc(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and "did you mean model=llama_60m" in first


# ---- training


def test_it_is_the_run_that_the_command_makes(sltrain_train: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    code, out, _ = sltrain_train(*as_overrides({"model": "llama_tiny", **TINY, "run_dir": folder / "typed"}))
    typed, called = sltrain.Run(folder / "typed"), sltrain.Run(folder / "outputs/example")
    assert code == 0 and typed.outcome == called.outcome == "finished"
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in (typed, called)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(typed.load().parameters(), called.load().parameters(), strict=True))
    assert called.final is not None and called.final == {**called.metrics[-1]}
    assert called.generate("def ", max_new_tokens=3) == typed.generate("def ", max_new_tokens=3)
    assert called.evaluate()["loss"] == called.final["loss"]


def test_progress_is_shown_unless_the_program_decides_otherwise(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    package = logging.getLogger("sltrain")
    sltrain.train("llama_tiny", run_dir=tmp_path / "shown", **TINY)
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == f"finished: {tmp_path / 'shown'}" and "step 3/3" in err
    package.setLevel(logging.WARNING)
    try:
        sltrain.train("llama_tiny", run_dir=tmp_path / "quiet", **TINY)
    finally:
        package.setLevel(logging.NOTSET)
    assert capfd.readouterr() == ("", "")
    assert not package.handlers and package.propagate


def interrupt_at(step: int, run_dir: Path) -> threading.Thread:
    """Send this process SIGINT once metrics.jsonl has a line of `step`."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if f'"step": {step},' in (run_dir / "metrics.jsonl").read_text():
                    break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_an_interrupt_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    keys = {**TINY, "max_steps": 2000, "warmup_steps": 10, "log_every": 1}
    before = signal.getsignal(signal.SIGINT)
    thread = interrupt_at(2, tmp_path / "run")
    run = sltrain.train("llama_tiny", run_dir=tmp_path / "run", **keys)
    thread.join()
    assert run.outcome == "interrupted" and signal.getsignal(signal.SIGINT) is before
    stopped = run.metrics[-1]["step"]
    assert 2 <= stopped < 2000 and run.final is None
    assert run.load().training and math.isfinite(run.evaluate(eval_tokens=100)["loss"])
    thread = interrupt_at(stopped + 1, tmp_path / "run")
    again = sltrain.train("llama_tiny", run_dir=run, **keys)  # a run stands for its folder
    thread.join()
    steps = [line["step"] for line in again.metrics if line["event"] == "train"]
    assert again == run and steps == list(range(1, steps[-1] + 1)) and steps[-1] > stopped


def test_it_trains_in_any_thread(tmp_path: Path) -> None:
    runs: list[sltrain.Run] = []
    thread = threading.Thread(target=lambda: runs.append(sltrain.train("llama_tiny", run_dir=tmp_path / "run", **TINY)))
    thread.start()
    thread.join()
    assert [run.outcome for run in runs] == ["finished"]


def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sltrain.building import run as building

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(building, "build_trainer", fail)
        with pytest.raises(sltrain.Error, match="No space left on device") as raised:
            sltrain.train("llama_tiny", run_dir=tmp_path / "run", **TINY)
        assert isinstance(raised.value.__cause__, OSError)
    assert not [thread for thread in threading.enumerate() if thread.name == "sltrain-data"]
    assert sltrain.train("llama_tiny", run_dir=tmp_path / "run", **TINY).outcome == "finished"  # the lock is free


# ---- values as they would be typed


@pytest.mark.parametrize(
    ("keys", "typed"),
    [
        ({"model": "llama_60m"}, ["model=llama_60m"]),
        ({"rank": 8, "lr": 1e-5, "grad_clip": None}, ["rank=8", "lr=1e-05", "grad_clip=null"]),
        ({"compile": True, "memory_guard": False}, ["compile=true", "memory_guard=false"]),
        ({"path": Path("/a b/[0-9],x*.gz")}, ["path='/a b/[0-9],x*.gz'"]),
        ({"path": ["it's", "a"]}, ["path=['it\\'s','a']"]),
        ({"method": {"name": "low_rank", "rank": 8}}, ["method=low_rank", "method.rank=8"]),
        ({"data": {"shuffle_block": 16}}, ["data.shuffle_block=16"]),
        ({"data.shuffle_block": 16}, ["data.shuffle_block=16"]),
        ({"rank_overrides": {"q_proj": 8, "model.layers.0.*": 4}}, ["rank_overrides={q_proj:8,model.layers.0.*:4}"]),
        ({"rank": torch.tensor([3]).numpy()[0]}, ["rank=3"]),
    ],
)  # fmt: skip
def test_values_become_what_is_typed(keys: dict[str, Any], typed: list[str]) -> None:
    assert as_overrides(keys, ["seed=1"]) == [*typed, "seed=1"]
    assert len(parse_overrides(typed)) == len(typed)


def test_values_arrive_as_they_were_given() -> None:
    awkward = r"""/tmp/it's "this", {x}=[y] \ $z: 100 %"""
    keys = {"model": "llama_tiny", "data": {"name": "local"}, "path": [awkward, "b"], "tokenizer": awkward}
    keys |= {"rank_overrides": {"model.layers.[01].*_proj": 8, "q_proj": 4}, "lr": 1e-7}
    config = compose_config(as_overrides(keys), TRAIN)
    assert config.path == [awkward, "b"] and config.tokenizer == awkward and config.lr == 1e-7
    assert config.rank_overrides == keys["rank_overrides"]


def test_it_composes_inside_a_hydra_application(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import hydra, sltrain\n"
        "@hydra.main(version_base=None, config_path=None)\n"
        "def app(config):\n"
        "    print(sltrain.plan('llama_60m').total_bytes)\n"
        "    print(hydra.core.global_hydra.GlobalHydra.instance().is_initialized())\n"
        "app()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "app.py", "hydra.run.dir=."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == f"{sltrain.plan('llama_60m').total_bytes}\nTrue\n", done.stderr


# ---- mistakes

RUN = "outputs/example"
MISTAKES: list[tuple[str, Callable[[], Any], str]] = [
    ("a model that does not exist", lambda: sltrain.train("llama_61m"), "did you mean model=llama_60m"),
    ("no model", lambda: sltrain.train(data="stdlib"), "no model is chosen"),
    ("a misspelled key", lambda: sltrain.train("llama_tiny", leraning_rate=1), "unknown key 'leraning_rate'"),
    ("another's option", lambda: sltrain.train("llama_tiny", method={"name": "full", "rank": 8}), "method=full has no"),
    ("a value of another type", lambda: sltrain.train("llama_tiny", rank="many"), "rank='many'"),
    ("a value that nobody can type", lambda: sltrain.train("llama_tiny", rank=object), "a type cannot be a value"),
    ("a group that is a number", lambda: sltrain.train("llama_tiny", data=3), "data=3: give a name"),
    ("one override as a string", lambda: sltrain.train("llama_tiny", overrides="rank=8"), "give a list of strings"),
    ("a file as run_dir", lambda: sltrain.train("llama_tiny", **{**TINY, "run_dir": __file__}), "is a file"),
    ("another run's folder", lambda: sltrain.train("llama_tiny", **{**TINY, "seed": 7, "run_dir": RUN}), "seed was 42"),
    ("files that are not there", lambda: sltrain.train("llama_tiny", data="local", path="/no/*.gz"), "matches no file"),
    ("a card that nobody knows", lambda: sltrain.plan("llama_60m", cards=["h101"]), "h101 is unknown"),
    ("no such folder", lambda: sltrain.load("nowhere"), "nowhere does not exist"),
    ("a step without checkpoint", lambda: sltrain.load(RUN, step=2), "no checkpoint of step 2"),
    ("a device that is not there", lambda: sltrain.generate(RUN, "a", device="cuda"), "no CUDA GPU"),
    ("no room for a token", lambda: sltrain.generate(RUN, "a", max_new_tokens=0), "at least 1"),
    ("an unknown format", lambda: sltrain.export(RUN, "x", format="onnx"), "choose one of dense, compressed"),
    ("an unknown dtype", lambda: sltrain.export(RUN, "x", dtype=torch.float16), "choose one of None, float32"),
    ("text that is not there", lambda: sltrain.evaluate(RUN, "/no/*.txt"), "matches no file"),
    ("a run that is not there", lambda: sltrain.Run("nowhere").outcome, "nowhere does not exist"),
    ("no runs", lambda: sltrain.report([]), "no path is given"),
    ("a report over a run", lambda: sltrain.report(RUN, RUN), "is a run folder"),
    ("an unknown benchmark", lambda: sltrain.bench(what="all"), "choose one of layer, step, data"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_one_line(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(sltrain.Error) as raised:
        call()
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert isinstance(raised.value.__cause__, ValueError | OSError)
