"""`sltrain-bench` prints a table or one JSON object, and refuses what it cannot measure with one line."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from sltrain.api.bench import measure
from sltrain.benchmarks import step
from sltrain.benchmarks.base import format_table, write
from sltrain.benchmarks.settings import COMMON, KEYS, BenchConfig, read_arguments
from sltrain.commands.bench import run_command

Run = Callable[..., tuple[int, str, str]]

LAYER = ["what=layer", "shapes=[[24,16,4]]", "tokens=8", "repeats=2", "device=cpu", "sparsity=0.1"]
STEP = ["what=step", "model=llama_tiny", "batch=2", "seq_len=16", "repeats=2", "device=cpu", "time_limit_s=600"]


@pytest.fixture
def sltrain_bench(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command(list(arguments))
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


def test_the_usual_layers_as_a_table(sltrain_bench: Run) -> None:
    """The columns of README's table."""
    code, out, err = sltrain_bench(*LAYER)
    assert code == 0, err
    title = next(line for line in out.splitlines() if line.startswith("| out x in"))
    columns = [cell.strip() for cell in title.strip("|").split("|")]
    named = ["dense", "uniform", "stratified", "block", "column", "low_rank", "uniform_composed", "published"]
    assert columns == ["out x in, rank", *named, "floor of uniform", "GFLOP/s"]
    assert "24x16 r4" in out and "geometric mean" in out
    assert "rounds" in err and "rounds" not in out


def test_json_is_the_last_line(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*LAYER, "format=json", "candidates=[dense,published,block]")
    assert code == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert answer["what"] == "layer" and answer["machine"]["torch"] == torch.__version__
    assert answer["settings"]["shapes"] == [[24, 16, 4]]
    assert {row["measured"] for row in answer["rows"]} == {"dense", "published", "block"}
    assert all(row["seconds"] > 0 and row["ratio_to_dense"] > 0 for row in answer["rows"])


def test_calibration(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*LAYER, "format=json", "calibrate=true")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["measured"] for row in rows} == {"entry", "block_entry", "column_entry", "weight_pass"}
    assert all(row["price"] == other["price"] for row in rows for other in rows if row["measured"] == other["measured"])


def test_step_as_json(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*STEP, "format=json", "candidates=[full,uniform]")
    assert code == 0, err
    full, uniform = json.loads(out.splitlines()[-1])["rows"]
    assert (full["measured"], uniform["measured"]) == ("full", "uniform")
    assert full["ratio_to_dense"] == 1 and uniform["limit"] > 1
    assert min(row["peak_memory_bytes"] for row in (full, uniform)) > 50e6  # torch alone is larger
    assert "uniform" in err and "alone" in err


def test_an_optimizer_beside_adamw(sltrain_bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: `test_step_as_json` measures in processes of their own."""
    monkeypatch.setattr(step, "run_alone", lambda function, *arguments: function(*arguments))
    code, out, err = sltrain_bench(*STEP, "optimizers=[scale]")
    assert code == 0, err
    lines = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert lines[2:] == ["adamw", "scale"]
    head = next(line for line in out.splitlines() if line.startswith("|"))
    assert "ratio" in head and "+-" in head and "speed-up" not in head


def test_data_as_json(sltrain_bench: Run, corpus: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "an 'odd' name, ümlaut=1"
    folder.symlink_to(corpus)
    arguments = ["what=data", "model=llama_tiny", "seq_len=32", "repeats=1", f'path="{folder}/*.json.gz"']
    code, out, err = sltrain_bench(*arguments, f"tokenizer={tokenizer_file}", "format=json")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    measured = [row["measured"] for row in rows]
    paddings = ("truncate_pad", "pack", "best_fit")
    assert measured[:4] == ["document by document", *(f"stream, {padding}" for padding in paddings)]
    assert measured[4:] == [f"training of llama_tiny, {padding}" for padding in paddings]
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows)


def test_from_python() -> None:
    data, text = measure(read_arguments([*LAYER, "candidates=[dense,low_rank]"]))
    assert data["what"] == "layer" and [row["measured"] for row in data["rows"][:2]] == ["dense", "low_rank"]
    assert "low_rank" in text


def test_columns_align_and_empty_ones_are_omitted() -> None:
    rows = [{"name": "a", "x": 1.5, "none": None}, {"name": "longer", "x": None}]
    assert format_table(rows, [("name", "name", ""), ("x", "x", ".2f"), ("none", "none", "")]).splitlines() == [
        "| name   |    x |",
        "| ------ | ---: |",
        "| a      | 1.50 |",
        "| longer |    - |",
    ]


def test_units() -> None:
    assert (write(0.0123, "time"), write(12.345, "time")) == ("12.3 ms", "12.35 s")
    assert (write(2.5e9, "bytes"), write(3e6, "bytes"), write(0.256, ".0%")) == ("2.50 GB", "3.0 MB", "26%")


# (arguments, words the message must hold)
BAD: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["what=layer", "what=step"]),
    "unknown what": (["what=lyer"], ["what=lyer", "layer"]),
    "unknown key": (["wat=layer"], ["wat", "what"]),
    "unknown candidate": (["what=layer", "candidates=[dens]"], ["dens", "dense"]),
    "candidate of another": (["what=layer", "candidates=[full]"], ["full", "what=layer"]),
    "no candidates": (["what=layer", "candidates=[]"], ["candidates=[]", "--help"]),
    "the same twice": (["what=layer", "candidates=[dense,dense]"], ["candidates=['dense', 'dense']", "once"]),
    "unknown path": (["what=layer", "candidates=[uniform_dense]"], ["uniform_dense", "composed, factored"]),
    "no path": (["what=layer", "candidates=[uniform_]"], ["uniform_", "composed, factored"]),
    "block size of none": ([*LAYER, "block_size=8", "candidates=[dense]"], ["block_size=8", "block, which"]),
    "no globs": (["what=data", "path=[]"], ["path=[]", "glob"]),
    "a path of none": (["what=layer", "candidates=[dense_factored]"], ["dense_factored", "none"]),
    "unknown method": (["what=step", "model=llama_tiny", "candidates=[ful]"], ["ful ", "full", "low_rank"]),
    "two models": (["what=step", "model=llama_tiny", "seq_len=1"], ["seq_len=1", "at least 2"]),
    "negative tokens": (["what=layer", "tokens=-3"], ["tokens=-3", "at least 1"]),
    "wrong type": (["what=layer", "tokens=abc"], ["tokens=abc", "Integer"]),
    "shapes of numbers": (["what=layer", "shapes=5"], ["shapes=5"]),
    "no shapes": (["what=layer", "shapes=[]"], ["shapes=[]", "[[512,512,128]]"]),
    "shape without rank": (["what=layer", "shapes=[[4,4]]"], ["[4, 4]", "rank"]),
    "rank above the shape": (["what=layer", "shapes=[[4,8,5]]"], ["[4, 8, 5]", "at most 4"]),
    "rank above the model": (["what=step", "model=llama_tiny", "rank=129"], ["129", "128", "q_proj"]),
    "block above the shape": ([*LAYER, "block_size=32"], ["block_size=32", "24x16", "16"]),
    "calibrate a step": (["what=step", "model=llama_tiny", "calibrate=true"], ["calibrate", "what=layer"]),
    "calibrate candidates": (["what=layer", "calibrate=true", "candidates=[dense]"], ["calibrate", "candidates"]),
    "key of another": (["what=step", "model=llama_tiny", "tokens=4"], ["tokens", "what=layer"]),
    "no such text": (["what=data", "path=/nowhere/*.gz"], ["/nowhere/*.gz"]),
    "path is a number": (["what=data", "path=5"], ["path=5", "glob"]),
    "no tokenizer": (["what=data", "tokenizer=/nowhere/tokenizer.json"], ["/nowhere/tokenizer.json"]),
    "candidates of data": (["what=data", "candidates=[dense]"], ["candidates", "what=layer and what=step"]),
    "two lists": ([*STEP, "methods=all", "candidates=[full]"], ["methods and candidates", "keep one"]),
    "a list of none": ([*STEP, "optimizers=[]"], ["optimizers=[]", "adafactor"]),
    "a list is one name": ([*STEP, "methods=sltrain"], ["methods=sltrain", "methods=["]),
    "a method of no list": ([*STEP, "method=sltrain"], ["method=sltrain", "methods=[sltrain]"]),
    "unknown optimizer": ([*STEP, "optimizers=[adamx]"], ["adamx", "adamw"]),
    "unknown method of the list": ([*STEP, "methods=[ful]"], ["method=ful", "full"]),
    "no model": (["what=step"], ["model=llama_60m"]),
    "unknown model": (["what=step", "model=llama_6m"], ["llama_6m", "llama_60m"]),
    "row too long": (["what=step", "model=llama_tiny", "seq_len=2048"], ["seq_len=2048", "max_position"]),
    "no GPU": ([*LAYER, "device=cuda"], ["device=cuda", "device=cpu"]),
    "no time": (["what=layer", "time_limit_s=0"], ["time_limit_s=0", "above 0"]),
    "sparsity": (["what=layer", "sparsity=1.5"], ["sparsity=1.5", "below 1"]),
    "sweep": (["-m", "what=layer"], ["-m", "KEY=VALUE"]),
    "several values": (["what=layer,step"], ["what=layer,step"]),
    "no equals sign": (["layer"], ["key=value"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, sltrain_bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, words = BAD[case]
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    code, out, err = sltrain_bench(*arguments)
    assert code == 2, err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert out == "" and list(tmp_path.iterdir()) == []
    for word in words:
        assert word in err


def test_help_explains_every_key(sltrain_bench: Run) -> None:
    code, out, _ = sltrain_bench("--help")
    assert code == 0
    for item in fields(BenchConfig):
        line = next(line for line in out.splitlines() if line.strip().startswith((f"{item.name}=", f"{item.name} ")))
        assert len(line.split()) > 2, line


def test_every_key_is_read_by_the_benchmarks_that_take_it() -> None:
    package = Path(__file__).resolve().parents[2] / "sltrain"
    files = [*package.glob("benchmarks/*.py"), *package.glob("*/bench.py")]
    text = "".join(file.read_text() for file in files if file.name != "settings.py")
    keys = {item.name for item in fields(BenchConfig)}
    assert not [key for key in keys - {"what", "format"} if f"config.{key}" not in text]
    assert {*COMMON, *(key for of_one in KEYS.values() for key in of_one)} == keys
