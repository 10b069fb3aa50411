"""`sltrain-eval`: the run's own numbers again, and transformers' loss over the same rows."""

import gzip
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml

from sltrain.api import evaluate as evaluation
from sltrain.commands import evaluate as command
from sltrain.commands import export
from sltrain.commands.train import run_command as train

Run = Callable[..., tuple[int, str, str]]
NUMBERS = ("loss", "perplexity", "bits_per_byte")
PUBLISHED = "perplexity_galore_protocol"  # left out of few batches
SEQ_LEN, BATCH = 32, 4
RUNS = {
    "held_out": [],
    "files": ["checkpoint_every=2", "eval_every=2", "max_steps=4", "keep_last=3", "validation_path={texts}"],
    "packed": ["padding=pack", "validation_path={texts}"],
}


@pytest.fixture(scope="module")
def texts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of plain ASCII in a shard of its own."""
    lines = [line for file in sorted(corpus.glob("*.json.gz")) for line in gzip.open(file, "rt")]
    picked = [text for text in (json.loads(line)["text"] for line in lines) if text.isascii()][::2]
    path = tmp_path_factory.mktemp("texts") / "validation.jsonl"
    path.write_text("".join(json.dumps({"text": text[: 40 + 3 * i]}) + "\n" for i, text in enumerate(picked)))
    return path


@pytest.fixture(scope="module")
def model(tiny: list[str], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of RUNS, or its export."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str, format: str | None = None) -> Path:
        run = folder / name
        if not run.exists():
            more = [override.format(texts=texts) for override in RUNS[name]]
            arguments = [*tiny, "max_steps=2", "model.initializer_range=0.2", "lr=0.02", *more, f"run_dir={run}"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["sltrain-train", *arguments])
                assert train(arguments) == 0
        if format is None:
            return run
        output = folder / f"{name}_{format}"
        if not output.exists():
            assert export.run_command([str(run), "--output", str(output), "--format", format]) == 0
        return output

    return make


@pytest.fixture
def sltrain_eval(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = command.run_command([str(argument) for argument in arguments])
        return int(code), *capfd.readouterr()

    return run


def numbers_of(result: tuple[int, str, str]) -> dict:
    """The object on the last line of stdout, strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    code, out, err = result
    assert code == 0, err
    (line,) = out.splitlines()
    return json.loads(line, parse_constant=refuse)


def same_numbers(a: dict, b: dict) -> None:
    assert a["eval_tokens"] == b["eval_tokens"] and a["step"] == b["step"]
    for name in NUMBERS:
        assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_own_numbers_again(name: str, model: Callable[..., Path], sltrain_eval: Run) -> None:
    run = model(name)
    summary = json.loads((run / "summary.json").read_text())
    found = numbers_of(sltrain_eval(run, "--json"))
    assert set(found) == {*NUMBERS, "eval_tokens", "step"}
    same_numbers(found, summary)


def test_an_earlier_step(model: Callable[..., Path], sltrain_eval: Run) -> None:
    run = model("files")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["event"] == "eval" and line["step"] == 2]
    same_numbers(numbers_of(sltrain_eval(run, "--json", "--step", 2)), line)
    assert line["loss"] != json.loads((run / "summary.json").read_text())["loss"]


@pytest.mark.parametrize("name", ["files", "packed"])
@pytest.mark.parametrize("format", [None, "dense", "compressed"])
def test_the_validation_files_by_name(
    name: str, format: str | None, model: Callable[..., Path], texts: Path, sltrain_eval: Run
) -> None:
    """The run's numbers, if the harness sees as many rows at a time; an export does not know how many."""
    summary = json.loads((model(name) / "summary.json").read_text())
    flags = ["--path", texts, "--eval-tokens", 500, "--json", *(["--batch-size", BATCH] if format else [])]
    same_numbers(numbers_of(sltrain_eval(model(name, format), *flags)), summary)


def rows_by_hand(texts: Path, tokenizer: transformers.PreTrainedTokenizerBase, packed: bool) -> list[tuple]:
    """(ids, bytes of all but the first) of every row, by the tokenizer's own offsets."""
    documents = []
    for line in texts.read_text().splitlines():
        text = json.loads(line)["text"]
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0] + [end for _, end in encoding["offset_mapping"]]
        sizes = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        assert sum(sizes) == len(text)  # ASCII, and nothing is dropped
        documents.append((encoding["input_ids"], sizes))
    if not packed:
        cut = [(ids[: SEQ_LEN - 1] + [1], sizes[: SEQ_LEN - 1] + [0]) for ids, sizes in documents]
    else:
        ids = [i for document, _ in documents for i in [*document, 1]]
        sizes = [size for _, sizes in documents for size in [*sizes, 0]]
        cut = [(ids[i : i + SEQ_LEN], sizes[i : i + SEQ_LEN]) for i in range(0, len(ids), SEQ_LEN)]
    return [(ids, sum(sizes[1:])) for ids, sizes in cut]


@pytest.mark.parametrize(("name", "padding"), [("files", None), ("packed", None), ("files", "pack")])
def test_every_number_by_transformers(
    name: str, padding: str | None, model: Callable[..., Path], texts: Path, sltrain_eval: Run
) -> None:
    """Rows as they were trained, and of a run of truncated documents with `--padding pack`: its documents whole."""
    dense = model(name, "dense")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(dense)
    rows = rows_by_hand(texts, transformers.AutoTokenizer.from_pretrained(dense), "pack" in (padding, name[:4]))
    losses = []
    with torch.no_grad():
        for ids, _ in rows:
            logits = theirs(torch.tensor([ids])).logits[0].double()
            losses.append(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"))
    total, count = sum(float(loss.sum()) for loss in losses), sum(map(len, losses))
    batches = [loss.mean() for loss in losses]
    num_bytes = sum(size for _, size in rows)
    assert len(rows) > 20 and count > 500
    flags = ["--path", texts, "--json", *(["--padding", padding] if padding else [])]
    found = numbers_of(sltrain_eval(model(name), *flags, "--batch-size", 1))
    assert found["eval_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    galore = math.exp(float(sum(batches)) / (len(batches) + 1))
    assert found.get(PUBLISHED) == pytest.approx(galore, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)


def test_the_batch_size_changes_one_number(model: Callable[..., Path], texts: Path, sltrain_eval: Run) -> None:
    """And with one batch of everything that number would be about the square root of the others: it is left out."""
    one, two, all_rows = (
        numbers_of(sltrain_eval(model("packed", "dense"), "--path", texts, "--json", "--batch-size", size))
        for size in (1, 2, 10_000)
    )
    assert one[PUBLISHED] > two[PUBLISHED] and PUBLISHED not in all_rows
    for name in (*NUMBERS, "eval_tokens"):
        assert one[name] == pytest.approx(two[name], rel=1e-5) == pytest.approx(all_rows[name], rel=1e-5)


def test_padding_reads_whole_documents_or_their_beginnings(
    model: Callable[..., Path], texts: Path, sltrain_eval: Run
) -> None:
    """As a run that was trained so reads them; on the run's own validation text too."""
    for flags in (["--path", texts], []):
        tokens = {
            (name, padding): numbers_of(
                sltrain_eval(model(name), *flags, "--json", "--eval-tokens", 10**9, "--padding", padding)
            )["eval_tokens"]
            for name in ("files", "packed")
            for padding in ("pack", "truncate_pad")
        }
        assert tokens["files", "pack"] == tokens["packed", "pack"] > 2 * tokens["files", "truncate_pad"]
        assert tokens["files", "truncate_pad"] == tokens["packed", "truncate_pad"]


def test_eval_tokens_end_the_text(model: Callable[..., Path], texts: Path, sltrain_eval: Run) -> None:
    run = model("held_out")
    few = numbers_of(sltrain_eval(run, "--path", texts, "--json", "--eval-tokens", 100))["eval_tokens"]
    everything = numbers_of(sltrain_eval(run, "--path", texts, "--json"))["eval_tokens"]
    assert 100 <= few < 100 + SEQ_LEN and everything > 10 * few


def test_several_files_and_plain_text(
    model: Callable[..., Path], texts: Path, tmp_path: Path, sltrain_eval: Run
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"import {name}\n" * 40)
    run = model("packed")
    counts = [
        numbers_of(sltrain_eval(run, "--json", "--path", *paths))["eval_tokens"]
        for paths in ([tmp_path / "a.txt"], [tmp_path / "b.txt"], [tmp_path / "a.txt", tmp_path / "b.txt"])
    ]
    assert counts[2] == pytest.approx(counts[0] + counts[1], abs=3) and counts[0] > 50
    assert numbers_of(sltrain_eval(run, "--json", "--path", f"{tmp_path}/*.txt"))["eval_tokens"] == counts[2]


def test_for_a_person(model: Callable[..., Path], sltrain_eval: Run) -> None:
    run = model("held_out")
    summary = json.loads((run / "summary.json").read_text())
    code, out, err = sltrain_eval(run)
    assert code == 0 and "evaluating" in err
    found = dict(re.findall(r"^(\S+) +(\S+)$", out, re.MULTILINE))
    assert set(found) == {*NUMBERS, "eval_tokens", "step"}
    assert float(found["loss"].replace(",", "")) == pytest.approx(summary["loss"], abs=6e-5)
    assert found["eval_tokens"] == f"{summary['eval_tokens']:,}" and found["step"] == "2"


def test_a_long_text_says_how_far_it_is(
    model: Callable[..., Path], texts: Path, sltrain_eval: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sltrain.log.Pace.SECONDS", 0.0)
    code, out, err = sltrain_eval(model("packed"), "--path", texts, "--batch-size", 1)
    total = re.search(r"^eval_tokens +(\S+)$", out, re.MULTILINE)[1]
    lines = err.splitlines()
    assert re.fullmatch(rf"read {total} tokens of \S+/validation.jsonl, [0-9,.]+ a second", lines[-2 - len(lines) // 2])
    assert re.fullmatch(rf"evaluated {total} of {total} tokens, [0-9,.]+ a second, 00:00 left", lines[-1])
    assert code == 0 and len(lines) > 20


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_it_says_so_and_gives_no_number(
    name: str, model: Callable[..., Path], texts: Path, in_child: Callable, tmp_path: Path
) -> None:
    """The exit code that conf/README.md gives a command with nothing to save."""
    run, written = model("packed"), tmp_path / "written"

    def evaluate() -> None:
        def stop_after_two(batches: Any) -> Any:
            for number, batch in enumerate(batches):
                if number == 2:
                    os.kill(os.getpid(), getattr(signal, name))
                yield batch

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked pool of that library would never answer
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have made it ignored
        original = evaluation.counted
        evaluation.counted = lambda rows: stop_after_two(original(rows))
        sys.argv = ["sltrain-eval", str(run), "--path", str(texts), "--batch-size", "1"]
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        try:
            command.main()
        except SystemExit as ended:
            (tmp_path / "code").write_text(str(int(ended.code)))

    os.waitpid(in_child(evaluate), 0)
    lines = written.read_text().splitlines()
    assert lines[-1] == "interrupted" and len(lines) == 2 and lines[0].startswith("evaluating"), lines
    assert (tmp_path / "code").read_text() == "3"


def test_weights_that_diverged_are_strict_json(
    model: Callable[..., Path], texts: Path, sltrain_eval: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sltrain.formats.weights import WeightFiles

    exported, read = model("held_out", "dense"), WeightFiles.read
    monkeypatch.setattr(
        WeightFiles, "read", lambda self, name: read(self, name) * (math.nan if name == "model.norm.weight" else 1)
    )
    found = numbers_of(sltrain_eval(exported, "--path", texts, "--json"))
    assert found["loss"] is None and found["perplexity"] is None and found["eval_tokens"] > 0


# ---- what is refused


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


BAD_FLAGS = {
    "path matches nothing": (["--path", "/nowhere/*.gz"], ["/nowhere/*.gz"]),
    "path is a folder": (["--path", "{folder}"], ["{folder}", "folder"]),
    "path without a file": (["--path"], ["--path"]),
    "file without text": (["--path", "{folder}/empty.txt"], ["empty.txt", "no "]),
    "no tokens": (["--eval-tokens", "0"], ["eval-tokens 0", "at least 1"]),
    "no sequences": (["--batch-size", "-1"], ["batch-size -1", "at least 1"]),
    "no number": (["--batch-size", "many"], ["--batch-size", "many"]),
    "unknown padding": (["--padding", "left"], ["--padding", "left", "truncate_pad", "pack"]),
    "unknown step": (["--step", "3"], ["step 3", "2, 4"]),
    "unknown flag": (["--jsonl"], ["--jsonl", "--help"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case: str, model: Callable[..., Path], tmp_path: Path, sltrain_eval: Run) -> None:
    (tmp_path / "empty.txt").write_text("")
    flags, words = BAD_FLAGS[case]
    result = sltrain_eval(model("files"), *(flag.format(folder=tmp_path) for flag in flags))
    assert_refused(result, *(word.format(folder=tmp_path) for word in words))


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_an_export_has_no_corpus_and_one_step(
    format: str, model: Callable[..., Path], texts: Path, sltrain_eval: Run
) -> None:
    folder = model("files", format)
    assert_refused(sltrain_eval(folder), "--path", str(folder))
    assert_refused(sltrain_eval(folder, "--path", texts, "--step", 4), "step", str(folder))


def test_a_corpus_that_is_gone(
    tiny: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sltrain_eval: Run
) -> None:
    mine = tmp_path / "mine.json.gz"
    mine.write_bytes((corpus / "train.00000.json.gz").read_bytes())
    arguments = [*tiny, "max_steps=1", f"path={mine}", "data.holdout_every=2", f"run_dir={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["sltrain-train", *arguments])
    assert train(arguments) == 0
    mine.unlink()
    assert_refused(sltrain_eval(tmp_path / "run"), str(mine), "--path GLOB")
    code, _, err = sltrain_eval(tmp_path / "run", "--path", corpus / "train.00001.json.gz")
    assert code == 0, err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["validation_path"] = str(corpus / "train.00001.json.gz")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, err = sltrain_eval(tmp_path / "run")
    assert code == 0, "what it was trained on is not needed: " + err
    config |= {"validation_path": str(mine), "on_bad_data": "stop"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    mine.write_bytes(b"no gzip")
    assert_refused(sltrain_eval(tmp_path / "run"), str(mine), "--path GLOB")
