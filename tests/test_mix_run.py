"""data=mix as a user types it: every kind of source in one run, stopped twice, on two processes, with other weights."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resuming import assert_equal, lines, stopped_at
from safetensors.torch import load_file

import sltrain
from sltrain.data.bpe import train_bpe

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict]]
SEVERAL = ("web", "books", "forum", "python")  # local, tokens, hf, stdlib


@pytest.fixture(scope="module")
def sources(corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a file for data=local, of ids for data=tokens, and of files that `datasets` opens."""
    folder = tmp_path_factory.mktemp("sources")
    parts = [gzip.decompress(file.read_bytes()) for file in sorted(corpus.glob("*.gz"))]
    (folder / "web.jsonl").write_bytes(parts[0])
    (folder / "web_dev.jsonl").write_bytes(parts[3])
    (folder / "hf").mkdir()
    (folder / "hf" / "train.jsonl").write_bytes(parts[1])
    (folder / "books.jsonl").write_bytes(parts[2])
    books = {"name": "local", "path": f"{folder}/books.jsonl", "holdout_every": 10}
    sltrain.tokenize(folder / "ids", data=books, tokenizer=str(tokenizer_file), processes=1)
    return folder


@pytest.fixture(scope="module")
def mixed(tiny: list[str], sources: Path) -> list[str]:
    """Overrides of a run on all kinds of sources."""
    entries = (
        f"web:{{path:{sources}/web.jsonl,weight:4,validation_path:{sources}/web_dev.jsonl}}",
        f"books:{{source:tokens,path:{sources}/ids,weight:3}}",
        f"forum:{{repo:{sources}/hf,weight:2}}",
        "python:{source:stdlib,weight:1}",
    )
    base = [text for text in tiny if not text.startswith(("data=", "path="))]
    return [*base, f"data.mix={{{','.join(entries)}}}", "padding=pack", "eval_every=3", "checkpoint_every=1"]


@pytest.fixture(scope="module")
def straight(mixed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, with a checkpoint of every update."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run = sltrain.train(overrides=[*mixed, f"run_dir={folder}", "keep_last=99"])
    assert run.outcome == "finished"
    return folder


def of_sources(line: dict[str, Any], what: str) -> dict[str, float]:
    return {name: line[f"{what}/{name}"] for name in SEVERAL}


def test_every_kind_of_source_is_in_the_log(straight: Path, metrics_of: Metrics) -> None:
    events = metrics_of(straight)
    train = [line for line in events if line["event"] == "train"]
    for line in train:
        assert sum(of_sources(line, "tokens").values()) == line["tokens"]
    assert min(of_sources(train[-1], "tokens").values()) > 0
    evaluated = [line for line in events if line["event"] in ("eval", "final")]
    assert [line["event"] for line in evaluated] == ["eval", "final"]
    for line in evaluated:
        tokens, losses = of_sources(line, "eval_tokens"), of_sources(line, "loss")
        assert sum(tokens.values()) == line["eval_tokens"]
        mean = sum(tokens[name] * losses[name] for name in SEVERAL) / line["eval_tokens"]
        assert line["loss"] == pytest.approx(mean, rel=1e-12)
        assert tokens == pytest.approx({"web": 200, "books": 150, "forum": 100, "python": 50}, abs=60)
    again = sltrain.evaluate(straight)
    assert {name: again[f"loss/{name}"] for name in SEVERAL} == of_sources(evaluated[-1], "loss")


def test_two_interruptions_change_no_bit(straight: Path, mixed: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    run = straight
    for step in (2, 4):
        run = stopped_at(run, step, tmp_path / f"stopped_{step}")
        code, out, err = sltrain_train(f"run_dir={run}")
        assert code == 0 and f"from step {step}" in out and "the weights of" not in out, err
    assert lines(run) == lines(straight)
    last = "checkpoints/step_00000006"
    assert (run / last / "model.safetensors").read_bytes() == (straight / last / "model.safetensors").read_bytes()
    states = [json.loads((folder / last / "state.json").read_text())["stream"] for folder in (run, straight)]
    assert_equal(*states)
    printed = [line for line in err.splitlines() if line.startswith("final evaluation at")]
    assert printed and all(f"{name} " in printed[0].partition("(books ")[2] for name in ("forum", "python", "web"))


def test_other_weights_on_resume_are_said_and_other_sources_refused(
    straight: Path, sources: Path, tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    run = stopped_at(straight, 3, tmp_path / "run")
    for typed, words in [
        (f"data.mix.news={{path:{sources}/web.jsonl,weight:1}}", "none can be added or removed"),
        ("data.mix.forum.text_key=title", "data.mix.forum.text_key was None, is now 'title'"),
        (f"data.mix.web.path={sources}/books.jsonl", "the corpus of data.mix.web has changed since the checkpoint"),
        ("data.mix.web.weight=0", "data.mix.web.weight=0: must be a number above 0"),
    ]:
        code, _, err = sltrain_train(f"run_dir={run}", typed)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    code, out, err = sltrain_train(f"run_dir={run}", "data.mix.web.weight=0.001", "data.mix.python.weight=9")
    assert code == 0, err
    said = "note       the weights of data.mix change after update 3: python 1 -> 9, web 4 -> 0.001; evaluations follow"
    assert any(line.startswith(said) for line in out.splitlines())
    ours, theirs = metrics_of(run), metrics_of(straight)
    assert [line for line in ours if line["step"] <= 3] == [line for line in theirs if line["step"] <= 3]
    gained = [
        {name: line[-1][f"tokens/{name}"] - line[2][f"tokens/{name}"] for name in SEVERAL}
        for line in ([e for e in events if e["event"] == "train"] for events in (ours, theirs))
    ]
    assert gained[0]["web"] == 0 and gained[0]["python"] > gained[1]["python"] + 200
    code, out, _ = sltrain_train(f"run_dir={stopped_at(run, 5, tmp_path / 'again')}")
    assert code == 0 and "the weights of" not in out  # config.yaml has the new ones


def test_two_processes_train_on_the_rows_of_one(
    straight: Path, mixed: list[str], tmp_path: Path, fork_train: Callable[..., Any], metrics_of: Metrics
) -> None:
    process = fork_train(*mixed, f"run_dir={tmp_path}/two", num_ranks=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    one, two = ([e for e in metrics_of(run) if e["event"] != "checkpoint"] for run in (straight, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        for key in a:
            if key.startswith(("tokens/", "eval_tokens/")):
                assert a[key] == b[key]
            if key.startswith("loss/"):
                assert b[key] == pytest.approx(a[key], rel=1e-4)
    last = "checkpoints/step_00000006/model.safetensors"
    ours, theirs = (load_file(run / last) for run in (straight, tmp_path / "two"))
    assert all(float((ours[name].float() - theirs[name].float()).abs().max()) < 1e-3 for name in ours)


def test_ids_of_another_tokenizer_are_refused(mixed: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    (tmp_path / "t.json").write_text(train_bpe(iter(["some other text"]), 300))
    for tokenizer, words in [
        ("bpe:300", "tokenizer=bpe:300 is trained on text"),
        (f"{tmp_path}/t.json", "data.mix.books: "),
    ]:
        code, _, err = sltrain_train(*mixed, f"run_dir={tmp_path}/run", f"tokenizer={tokenizer}")
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
        assert not (tmp_path / "run").exists()
