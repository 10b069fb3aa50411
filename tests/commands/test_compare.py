"""`sltrain-compare`: a real study of tiny runs, stopped and continued, and what it says to mistakes.

Runs are trained in this process, by the command that a process of their own would run; one test, marked slow, leaves
them their processes and kills them.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from sltrain.api.ledger import PAGE, _flops_per_token, _seconds_per_update, read_ledger
from sltrain.api.study import recorded, size_of
from sltrain.api.study_file import read_study
from sltrain.commands import compare, report, train
from sltrain.compose import conf_dir, run_config
from sltrain.engine.micro_batch import Feed
from sltrain.errors import ExitCode
from sltrain.reporting.study import Entry
from sltrain.runs.run_record import LEDGER

SEEDS = [11, 12]
T1 = math.tan(0.95 * math.pi / 2)  # the quantile of Student's t with one degree of freedom, Cauchy's distribution


@pytest.fixture
def study(tiny: list[str]) -> dict[str, Any]:
    """A study's YAML as a mapping: two candidates x two trials, one layer, six updates."""
    return {
        "common": [*tiny, "model.num_hidden_layers=1", "eval_every=2"],
        "reference": "dense",
        "trials": 2,
        "tuning_seeds": [1],
        "reporting_seeds": SEEDS,
        "candidates": {
            "dense": {"overrides": ["method=full"], "tune": {"lr": [1e-3, 1e-2]}},
            "sltrain": {"overrides": ["method=sltrain", "alpha=8"], "tune": {"lr": [1e-2, 1e30]}},
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(content: dict[str, Any]) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@dataclass
class Made:
    """Runs that were trained: their folders' names, and a hash of each batch that each of them read."""

    names: list[str] = field(default_factory=list)
    read: dict[str, list[str]] = field(default_factory=dict)
    stop_at: int | None = None  # of these runs the one that a signal interrupts


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Trains runs in this process."""
    made, fetch = Made(), Feed.fetch

    def run_here(jobs: Iterable[Any], places: Any) -> Generator[tuple[Any, int, bool], None, None]:
        for job in jobs:
            assert job.command[1:3] == ["-m", "sltrain.train"]
            if len(made.names) == made.stop_at:
                yield job, ExitCode.INTERRUPTED, True
            made.names.append(Path(job.command[-1].strip('"')).name)
            yield job, int(train.run_command(job.command[3:])), False

    def fetch_and_note(feed: Feed) -> Any:
        batch = fetch(feed)
        made.read.setdefault(made.names[-1], []).append(sha256(batch.input_ids.numpy().tobytes()).hexdigest())
        return batch

    monkeypatch.setattr(compare, "run_processes", run_here)
    monkeypatch.setattr(Feed, "fetch", fetch_and_note)
    yield made


@pytest.fixture
def sltrain_compare(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = compare.run_command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


def test_a_study_from_its_cost_to_its_page(
    study: dict[str, Any], write: Callable, made: Made, sltrain_compare: Callable, tmp_path: Path, metrics_of: Callable
) -> None:
    folder = tmp_path / "out"
    typed = [f"study={write(study)}", f"run_dir={folder}"]
    code, out, err = sltrain_compare(*typed, "dry_run=true")
    assert code == 0 and "cost       8 runs, 48 updates, 12.29K positions" in out, (out, err)
    assert not made.names and not folder.exists()

    made.stop_at = 3  # a signal, and a line that a power cut tore
    code, out, err = sltrain_compare(*typed)
    assert code == ExitCode.INTERRUPTED and "5 runs left, about" in out and out.endswith("the same command goes on\n")
    with open(folder / LEDGER, "a") as file:
        file.write('{"event": "run", "role": "tun')
    before, made.stop_at = (folder / LEDGER).read_bytes(), None
    code, out, err = sltrain_compare(*typed)
    assert code == 0, (out, err)
    assert len(made.names) == len({*made.names}) == 8
    assert (folder / LEDGER).read_bytes().startswith(before)

    ledger = read_ledger(folder)
    runs = list(ledger.runs.values())
    assert [(run.role, run.seed) for run in runs] == [("tuning", 1)] * 4 + [("reporting", s) for s in (11, 11, 12, 12)]
    for run, name in zip(runs, made.names, strict=True):  # what the ledger says is what the run's own folder says
        check_entry(run, metrics_of(folder / "runs" / name))
    tuning = {(run.candidate, run.trial): run.loss for run in runs if run.role == "tuning"}
    assert tuning["sltrain", 2] == math.inf  # lr=1e30
    best = {"dense": min((1, 2), key=lambda trial: tuning["dense", trial]), "sltrain": 1}
    assert all(run.trial == best[run.candidate] for run in runs if run.role == "reporting")
    texts = {run.role: (run.eval_tokens, run.eval_bytes) for run in runs if math.isfinite(run.loss)}
    assert texts["tuning"] != texts["reporting"]  # halves of the validation documents

    for seed in SEEDS:  # in the order in which they were read
        rows = [made.read[f"{name}_trial-{trial}_seed-{seed}"] for name, trial in best.items()]
        assert rows[0] == rows[1] and len(rows[0]) == 6
    assert made.read["sltrain_trial-1_seed-11"] != made.read["sltrain_trial-1_seed-12"]

    page = (folder / PAGE).read_text()
    losses = {name: [run.loss for run in runs if (run.role, run.candidate) == ("reporting", name)] for name in best}
    d = [own - other for own, other in zip(losses["sltrain"], losses["dense"], strict=True)]
    mean, half = sum(d) / 2, T1 * abs(d[0] - d[1]) / 2
    assert f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f})" in page
    assert all(f"{math.exp(loss):,.2f}" in page for own in losses.values() for loss in own)
    assert "| sltrain | lr=1e+30 | inf |  |" in page and "line 7 is damaged" in page

    shutil.rmtree(folder / "runs")  # the ledger alone draws the page, and nothing is run again
    (folder / PAGE).unlink()
    assert report.run_command(["--study", str(folder)]) == 0
    assert (folder / PAGE).read_text() == page
    assert sltrain_compare(*typed)[0] == 0 and len(made.names) == 8

    changed = {**study, "candidates": {**study["candidates"], "dense": {"tune": {"lr": [1, 2]}}}}
    assert sltrain_compare(typed[0], f"run_dir={folder / LEDGER}")[2].endswith(
        "is a file; name a folder for the study\n"
    )
    for content, typed_too, words in (
        ({**study, "reporting_seeds": [12, 13]}, [], "another protocol: reporting_seeds was [11, 12], is now [12, 13]"),
        (study, ["max_steps=7"], "another protocol: common now has max_steps=7. Type"),
        (changed, [], "another candidate dense: it was"),
    ):
        code, out, err = sltrain_compare(f"study={write(content)}", f"run_dir={folder}", *typed_too)
        assert code == ExitCode.BAD_INPUT and words in err and len(err.splitlines()) == 1, err


def check_entry(run: Entry, events: list[dict[str, Any]]) -> None:
    """Whether a line of the ledger is what metrics.jsonl has."""
    if math.isinf(run.loss):
        assert events[-1]["event"] == "stopped" and events[-1]["outcome"] == "diverged"
        return
    final = events[-1]
    assert run.loss == final["loss"] and run.eval_tokens == final["eval_tokens"]
    assert run.evals == [[event["step"], event["loss"]] for event in events if event["event"] == "eval"]
    assert (run.updates, run.num_parameters) == (6, final["num_parameters"]["total"])
    assert run.seconds_per_update and run.flops_per_token and run.machine and run.code and run.versions["torch"]


def test_a_screening_chooses_who_is_tuned_in_whole(
    study: dict[str, Any], write: Callable, made: Made, sltrain_compare: Callable, tmp_path: Path
) -> None:
    """Three rates each for two updates, the best two for all six; the page is drawn from the ledger."""
    study |= {"trials": 3, "screening": ["max_steps=2", "warmup_steps=1"], "finalists": 2}
    study["candidates"]["dense"]["tune"] = {"lr": [1e30, 1e-3, 1e-2]}
    study["candidates"]["sltrain"]["tune"] = {"lr": [1e-2, 1e-3, 1e30]}
    folder = tmp_path / "out"
    code, out, err = sltrain_compare(f"study={write(study)}", f"run_dir={folder}")
    assert code == 0, (out, err)
    assert "cost       14 runs, 60 updates, 15.36K positions" in out  # 6 x 2, 4 x 6 and 4 x 6 updates of 256
    assert "with max_steps=2 warmup_steps=1, the best 2 in whole, on validation half a" in out
    runs = list(read_ledger(folder).runs.values())
    assert [run.role for run in runs] == ["screening"] * 6 + ["tuning"] * 4 + ["reporting"] * 4
    assert [run.updates for run in runs if math.isfinite(run.loss)] == [2] * 4 + [6] * 8
    of_dense = {(run.role, run.trial): run.loss for run in runs if run.candidate == "dense"}
    assert of_dense["screening", 1] == math.inf and ("tuning", 1) not in of_dense
    best = min((2, 3), key=lambda trial: of_dense["tuning", trial])
    assert {trial for role, trial in of_dense if role == "reporting"} == {best}
    assert "dense_trial-2_seed-1_screening" in made.names and "dense_trial-2_seed-1" in made.names
    page = (folder / PAGE).read_text()
    assert "(all with `max_steps=2 warmup_steps=1`, then the best 2 in whole)" in page
    assert "| candidate | setting | screening | perplexity |" in page and "| dense | lr=1e+30 | inf |  |" in page
    made.names.clear()
    code, out, _ = sltrain_compare(f"study={write(study)}", f"run_dir={folder}")
    assert code == 0 and not made.names and "0 runs left" in out


@pytest.mark.parametrize("method", [[], ["method=pufferfish", "method.dense_share=0.25"]])
def test_the_size_of_a_run_is_what_it_logs(
    method: list[str], tiny: list[str], tmp_path: Path, metrics_of: Callable
) -> None:
    """Parameters and FLOPs before the run, by the model without memory, against those of its log, one line an update;
    the method may change the model on the way."""
    config = run_config([*tiny, *method, f"run_dir={tmp_path}", "max_steps=8", "log_every=1"])
    assert train.train(config) == ExitCode.OK
    size, events = size_of(config), metrics_of(tmp_path)
    lines = [event for event in events if event["event"] == "train"]
    of_tokens = [line["tflops"] * 1e12 / line["tokens_per_second"] for line in lines]
    assert size is not None and size.parameters == events[-1]["num_parameters"]["total"]
    assert len({round(flops) for flops in of_tokens}) == 1 + bool(method)
    assert size.flops_per_token == pytest.approx((2 * of_tokens[0] + 6 * of_tokens[-1]) / 8)
    assert size.flops == pytest.approx(size.flops_per_token * 8 * 8 * 32)


def test_the_time_of_an_update_is_a_mean_over_what_the_method_makes_of_the_model() -> None:
    """Two updates a line, 20 tokens: 2 s each with 1 FLOP a token, then 1 s with 3; of either part the median."""
    speeds = [(5, 1), (5, 1), (1, 1), (5, 1), (10, 3), (10, 3), (100, 3)]
    train: list[Any] = [
        {"step": 2 * i, "tokens": 20 * i, "tokens_per_second": speed, "tflops": flops * speed / 1e12}
        for i, (speed, flops) in enumerate(speeds, start=1)
    ]
    assert _seconds_per_update(train) == 1.5 and _flops_per_token(train) == 2.0
    assert _seconds_per_update(train[:4]) == 2.0


def test_what_is_recorded_of_a_run(tiny: list[str]) -> None:
    """Every key that decides its numbers, defaults too, and none of the machine."""
    base = recorded(run_config(tiny))
    assert recorded(run_config([*tiny, "run_dir=/elsewhere", "log_every=3", "tracker=wandb"])) == base
    assert base["weight_decay"] == 0 and base["eval_tokens"] and base["lr_scale"] == {}
    for typed in ("seed=1", "eval_part=a", "method.residual=1.0", "lr=1.0", "lr_scale={head:2.0}"):
        key = typed.partition("=")[0]
        now = recorded(run_config([*tiny, typed]))
        assert {name for name in now if now[name] != base[name]} == {key}


def test_a_default_that_changed_is_seen(
    study: dict[str, Any],
    write: Callable,
    made: Made,
    sltrain_compare: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run is not taken for one of today's if another version gave it another value of a key that nobody typed."""
    typed = [f"study={write(study)}", f"run_dir={tmp_path / 'out'}"]
    made.stop_at = 1
    assert sltrain_compare(*typed)[0] == ExitCode.INTERRUPTED
    later = tmp_path / "conf"
    shutil.copytree(conf_dir(), later)
    text = (later / "train.yaml").read_text()
    assert text.count("\nz_loss: 0.0") == 1
    (later / "train.yaml").write_text(text.replace("\nz_loss: 0.0", "\nz_loss: 1.0e-4"))
    monkeypatch.setattr("sltrain.compose.schema.conf_dir", lambda: later)
    monkeypatch.setattr("sltrain.compose.typed.conf_dir", lambda: later)
    code, _, err = sltrain_compare(*typed)
    assert code == ExitCode.BAD_INPUT and len(err.splitlines()) == 1, err
    assert "holds dense_trial-1_seed-1 made with z_loss=0.0, and today the same overrides mean z_loss=0.0001" in err


@pytest.mark.slow
def test_killed_with_its_run_it_goes_on(study: dict[str, Any], write: Callable, made: Made, tmp_path: Path) -> None:
    """SIGKILL to the study and to the run that it waits for."""
    folder = tmp_path / "out"
    typed = [f"study={write(study)}", f"run_dir={folder}"]
    process = subprocess.Popen([sys.executable, "-m", "sltrain", "compare", *typed], start_new_session=True)
    deadline, second = time.monotonic() + 300, folder / "runs" / "sltrain_trial-1_seed-1" / "metrics.jsonl"
    while not second.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = read_ledger(folder)
    assert next(iter(before.runs)) == ("tuning", "dense", 1, 1) and len(before.runs) < 8
    assert "finished: " in (folder / "runs" / "dense_trial-1_seed-1.log").read_text()
    assert compare.run_command(typed) == ExitCode.OK
    assert len(made.names) == 8 - len(before.runs) and "dense_trial-1_seed-1" not in made.names
    assert len(read_ledger(folder).runs) == 8 and (folder / PAGE).exists()


@pytest.mark.slow
def test_runs_at_once_are_those_of_one_after_the_other(
    study: dict[str, Any], write: Callable, made: Made, tmp_path: Path, sltrain_compare: Callable
) -> None:
    """In processes of their own, three at once; the losses are those of this process."""
    study["candidates"] = {name: {**own, "tune": {"lr": [1e-2, 1e-3]}} for name, own in study["candidates"].items()}
    path, found = write(study), []
    for jobs in (3, 1):
        if jobs > 1:
            command = [
                sys.executable,
                "-m",
                "sltrain",
                "compare",
                f"study={path}",
                f"run_dir={tmp_path / '3'}",
                "jobs=3",
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert "dense_trial-1_seed-1: perplexity" in done.stdout
        else:
            assert sltrain_compare(f"study={path}", f"run_dir={tmp_path / '1'}")[0] == 0
        found.append(read_ledger(tmp_path / str(jobs)).runs)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 8
    for key, run in found[0].items():
        assert run.loss == pytest.approx(found[1][key].loss, rel=1e-5)
        assert run.machine.endswith("3 runs at once") and "at once" not in found[1][key].machine


def test_a_candidate_of_another_length_is_screened_as_all_are(study: dict[str, Any], write: Callable) -> None:
    """More updates in as much time, which only the runs can tell."""
    study |= {"screening": ["max_steps=2", "warmup_steps=1"], "finalists": 1}
    study["candidates"]["sltrain"] |= {"overrides": ["method=sltrain", "max_steps=9"], "equal": {"time": "dense"}}
    found = read_study(str(write(study)), [])
    assert [config.max_steps for config in found.configs.values()] == [6, 6, 9, 9]
    assert [config.max_steps for config in found.screened.values()] == [2] * 4


def test_each_run_at_once_has_a_gpu_and_a_share_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert compare.places(1) == [{}] and compare.places(4) == [{"OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in compare.places(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "6,2")
    assert compare.places(2) == [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "6"} for gpu in "57"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((conf_dir() / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_package_compose(path: Path) -> None:
    """Every trial, on a corpus that every machine has; and what is said to be equal, is."""
    assert read_study(path.stem, ["data=stdlib"]).num_runs > 0
    for field_name in ("Command:", "Cost:", "What it says:"):
        assert f"# {field_name}" in path.read_text()


def with_dense(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda study: {
        **study,
        "candidates": {**study["candidates"], "dense": {**study["candidates"]["dense"], **changes}},
    }


def but(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda study: {**study, **changes}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (but(reporting_seeds=[11]), "reporting_seeds=[11]: an interval needs two or more"),
        (but(screening=["max_steps=2"]), "screening and finalists belong together"),
        (but(finalists=1), "screening and finalists belong together"),
        (but(screening=["max_steps=2"], finalists=2), "finalists=2: must be from 1 to 1, below trials=2"),
        (but(screening=["max_steps=0"], finalists=1), "screening of candidate dense, trial 1: max_steps=0"),
        (
            but(screening=["warmup_steps=1"], finalists=1),
            "the screening gives candidate dense 6 updates and the whole run has 6; shorten it",
        ),
        (
            lambda study: with_dense(tune={"lr": []})(but(trials=0)(study)),
            "trials=0: must be at least 1",
        ),
        (but(screening="max_steps=2", finalists=1), "screening: must be a list: [max_steps=500, lr=1e-3]"),
        (but(screening=["lr=1"], finalists=1), "the screening sets lr, and so does candidate dense; let it"),
        (but(screening=["method=full"], finalists=1), "the screening sets method, and so does candidate dense"),
        (but(screening=["seed=3"], finalists=1), "candidate dense sets seed, which the study sets"),
        (but(reporting_seeds=[1, 2]), "each seed may be there once only"),
        (but(tuning_seeds=[]), "tuning_seeds=[]: give at least one"),
        (but(reference="dence"), "reference=dence is none of the candidates dense, sltrain"),
        (but(trials=3), "candidate dense has 2 settings to try (2), and trials=3 is for all"),
        (but(wings=2), "wings"),
        (but(trials="many"), "trials: Value 'many' of type"),
        (lambda study: {key: value for key, value in study.items() if key != "trials"}, "trials is not set"),
        (lambda study: {**study, "candidates": {"dense": study["candidates"]["dense"]}}, "the only candidate"),
        (with_dense(overrides=["method=full", "rank=-3"]), "candidate dense, trial 1: rank=-3: must be at least 0"),
        (with_dense(overrides=["seed=3"]), "candidate dense sets seed, which the study sets"),
        (with_dense(overrides=["method=full", "seq_len=16"]), "seq_len=16"),
        (
            with_dense(overrides=["method=full", "max_steps=9"]),
            "sltrain, trial 1 (lr=0.01), has 0.667 times the tokens of dense, trial 1 (1,536 and 2,304)",
        ),
        (with_dense(tune={"lr": [1e-2, 1e-2]}), "tune has a value of lr twice"),
        (with_dense(equal={"parameters": "sltrain"}), "times the parameters of sltrain"),
        (with_dense(equal={"wings": "sltrain"}), "equal=wings: choose of tokens, parameters, flops, time"),
        (
            with_dense(overrides=["alpha=8"], tune={"rank": [8, 4]}, equal={"parameters": "sltrain"}),
            "candidate dense, trial 2 (rank=4), has 0.942 times the parameters of sltrain, trial 1",
        ),
        (
            with_dense(overrides=["method=full", "init_from=/a/run"]),
            "candidate dense starts from init_from=/a/run, which was trained on tokens of its own; say on how many",
        ),
        (
            with_dense(overrides=["method=full", "init_from=/a/run"], equal={"flops": "sltrain"}),
            "whose FLOPs and time are not known",
        ),
        (
            with_dense(overrides=["max_steps=5"], tune={"init_from": [None, "/a/run"]}, seen=256),
            "dense, trial 1 (init_from=None), has 0.833 times the tokens",
        ),
        (
            with_dense(overrides=["method=full", "init_from=/a/run"], seen=256),
            "sltrain, trial 1 (lr=0.01), has 0.857 times the tokens of dense, trial 1 (1,536 and 1,792)",
        ),
        (with_dense(seen=256), "seen=256 counts what init_from was trained on; set init_from"),
    ],
)
def test_mistakes_in_a_study(
    change: Callable, words: str, study: dict[str, Any], write: Callable, sltrain_compare: Callable, tmp_path: Path
) -> None:
    code, out, err = sltrain_compare(f"study={write(change(study))}", f"run_dir={tmp_path / 'out'}")
    assert code == ExitCode.BAD_INPUT and words in err and len(err.splitlines()) == 1, err
    assert not out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("study=frist", "study=frist does not exist; did you mean study=first? there are: first, headline"),
        ("study=nowhere.yaml", "study=nowhere.yaml: there is no such file"),
        ("dry_run=true", "study is not set; choose a study: study=first"),
        ("study=first jobs=0", "jobs=0: must be at least 1"),
        ("stduy=first", "unknown key 'stduy'; did you mean study?"),
        ("study=first --rank", "--rank: sltrain-compare knows KEY=VALUE and --help, and no other option"),
    ],
)
def test_mistakes_on_the_command_line(typed: str, words: str, sltrain_compare: Callable) -> None:
    code, out, err = sltrain_compare(*typed.split())
    assert code == ExitCode.BAD_INPUT and words in err and len(err.splitlines()) == 1 and not out, err


@pytest.mark.parametrize("content", [b"a: \x01", b"a: \xff", b"- a"])
def test_a_file_that_is_no_study_is_named(content: bytes, tmp_path: Path, sltrain_compare: Callable) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    code, _, err = sltrain_compare(f"study={path}")
    assert code == ExitCode.BAD_INPUT and str(path) in err and len(err.splitlines()) == 1


def test_a_name_twice(study: dict[str, Any], write: Callable, sltrain_compare: Callable) -> None:
    path = write(study)
    path.write_text(path.read_text().replace("  sltrain:\n", "  dense:\n"))
    code, _, err = sltrain_compare(f"study={path}")
    assert code == ExitCode.BAD_INPUT and "found duplicate key dense" in err and len(err.splitlines()) == 1


def test_a_run_that_cannot_start_ends_the_study(
    study: dict[str, Any], write: Callable, sltrain_compare: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What its process said last is the reason, and not what an earlier attempt said."""
    says = ["model ...\nerror: the corpus is gone\n", "memory is short\n"]

    def refuse(jobs: Iterable[Any], places: Any) -> Generator[tuple[Any, int, bool], None, None]:
        for job in jobs:
            with open(job.log, "a") as file:
                file.write(says.pop(0))
            yield job, int(ExitCode.BAD_INPUT), False

    monkeypatch.setattr(compare, "run_processes", refuse)
    code, _, err = sltrain_compare(f"study={write(study)}", f"run_dir={tmp_path / 'out'}")
    assert code == ExitCode.BAD_INPUT
    assert "dense_trial-1_seed-1 refused (exit code 2): the corpus is gone (all of it: " in err
    _, _, err = sltrain_compare(f"study={write(study)}", f"run_dir={tmp_path / 'out'}")
    assert "memory is short" in err and "the corpus is gone" not in err
    assert not read_ledger(tmp_path / "out").runs


def test_no_ledger_to_draw_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content, words in ((None, "holds no ledger of a study"), ("{}\n", "does not begin with a protocol")):
        if content is not None:
            (tmp_path / LEDGER).write_text(content)
        assert report.run_command(["--study", str(tmp_path)]) == ExitCode.BAD_INPUT
        assert words in capfd.readouterr().err
    assert report.run_command(["--study", str(tmp_path), "--json"]) == ExitCode.BAD_INPUT


def test_a_ledger_whose_first_line_was_torn_begins_again(
    study: dict[str, Any], write: Callable, made: Made, sltrain_compare: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / LEDGER).write_text('{"event": "protocol", "na')
    assert report.run_command(["--study", str(folder)]) == ExitCode.BAD_INPUT
    made.stop_at = 1
    code, out, err = sltrain_compare(f"study={write(study)}", f"run_dir={folder}")
    assert code == ExitCode.INTERRUPTED, err
    with open(folder / LEDGER, "a") as file:
        file.write('{"event": "candidate"}\n{"event": "run", "loss": 3')
    ledger = read_ledger(folder)
    assert ledger.protocol["reference"] == "dense" and [*ledger.candidates] == ["dense", "sltrain"]
    assert len(ledger.runs) == 1 and len(ledger.notes) == 3
    made.stop_at = 2
    assert sltrain_compare(f"study={write(study)}", f"run_dir={folder}")[0] == ExitCode.INTERRUPTED
    assert len(read_ledger(folder).runs) == 2


def test_the_ledger_is_strict_json(tmp_path: Path) -> None:
    """A loss that is infinite is null in the file, and infinite when read."""
    (tmp_path / LEDGER).write_text('{"event": "protocol", "name": "x"}\n')
    ledger = read_ledger(tmp_path)
    ledger.add(Entry("tuning", "dense", 1, {"lr": 1e9}, 1, math.inf, 5))
    line = (tmp_path / LEDGER).read_text().splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert read_ledger(tmp_path).runs == ledger.runs
