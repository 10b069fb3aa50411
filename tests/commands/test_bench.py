"""`sltrain-bench` prints a table or one JSON object, and refuses what it cannot measure with one line."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sltrain.api.bench import Bench, build_bench
from sltrain.api.bench_config import SCOPE, BenchConfig
from sltrain.api.bench_step import build_stepper, step_candidate, train_config
from sltrain.benchmarks.published import PublishedLinear
from sltrain.commands.bench import read_arguments, run_command, train_overrides
from sltrain.compose import TRAIN, compose_config

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


def bench(*arguments: str) -> Bench:
    config = read_arguments([*STEP, *arguments])
    return build_bench(config, compose_config(train_overrides(config), TRAIN), lambda line: None)


def test_layer_prints_tables(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*LAYER)
    assert code == 0, err
    assert "24x16 r4" in out and "geometric mean" in out and "uniform_factored" in out
    assert "rounds" in err and "rounds" not in out


def test_layer_as_json(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*LAYER, "format=json", "candidates=[dense,published,block]")
    assert code == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert answer["what"] == "layer" and answer["machine"]["torch"] == torch.__version__
    measured = {row["measured"] for row in answer["rows"]}
    floors = {"floor_dense", "floor_factored", "floor_composed"}
    assert measured == {"dense", "published", "block", "product", *floors}
    assert all(row["seconds"] > 0 and "ratio_to_dense" in row for row in answer["rows"])


def test_without_dense_there_is_no_ratio(sltrain_bench: Run) -> None:
    code, out, _ = sltrain_bench(*LAYER, "format=json", "candidates=[low_rank]")
    assert code == 0
    assert {row["ratio_to_dense"] for row in json.loads(out)["rows"]} == {None}


def test_calibration(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*LAYER, "format=json", "calibrate=true")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {row["measured"] for row in rows} == {"entry", "block_entry", "column_entry", "weight_pass"}
    assert all("used" in row and "price" in row for row in rows)


def test_step_as_json(sltrain_bench: Run) -> None:
    code, out, err = sltrain_bench(*STEP, "format=json", "candidates=[full,uniform]")
    assert code == 0, err
    full, uniform = json.loads(out.splitlines()[-1])["rows"]
    assert (full["measured"], uniform["measured"]) == ("full", "uniform")
    assert full["ratio_to_dense"] == 1 and uniform["limit"] > 1
    assert min(row["peak_memory_bytes"] for row in (full, uniform)) > 50e6  # torch alone is larger
    assert "uniform" in err and "alone" in err


def test_data_as_json(sltrain_bench: Run, corpus: Path, tokenizer_file: Path) -> None:
    arguments = ["what=data", "model=llama_tiny", "seq_len=32", "repeats=1", f"path={corpus}/*.json.gz"]
    code, out, err = sltrain_bench(*arguments, f"tokenizer={tokenizer_file}", "format=json")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    measured = [row["measured"] for row in rows]
    assert measured[:3] == ["document by document", "stream, truncate_pad", "stream, pack"]
    assert measured[3:] == ["training of llama_tiny, truncate_pad", "training of llama_tiny, pack"]
    assert all(row["seconds"] > 0 and row["ratio_to_dense"] is None for row in rows)


@pytest.mark.parametrize("name", ["full", "low_rank", "transformers"])
def test_the_floor_counts_the_products_that_torch_counts(name: str) -> None:
    subject = bench()
    candidate, stepper = step_candidate(subject, name), build_stepper(subject, name)
    with FlopCounterMode(display=False) as counter:
        stepper.update(torch.randint(4096, (2, 16)))
    # torch counts attention as if every position saw all others; ours is apart: layers * hidden * (1 + ... + 16) * 2
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 3 * 2 * 4 * 128 * 2 * sum(range(1, 17))
    without_targets = 3 * 2 * 128 * 4096  # a head may leave out the last position of each row
    assert candidate.multiply_adds - attention - products // 2 in (0, without_targets)


def test_the_floor_counts_s_and_what_is_computed_again() -> None:
    subject = bench("sparsity=0.5")
    work = {name: step_candidate(subject, name).multiply_adds for name in ("low_rank", "uniform", "checkpointing")}
    num_nonzero = 4 * (4 * 128 * 128 + 3 * 128 * 352) // 2
    assert work["uniform"] - work["low_rank"] == 3 * 32 * num_nonzero
    head = 3 * 32 * 128 * 4096
    assert 3 * (work["checkpointing"] - head) == 4 * (work["uniform"] - head)


def test_candidates_are_what_they_are_called() -> None:
    subject = bench("block_size=16")
    assert train_config(subject, "full").method.name == train_config(subject, "transformers").method.name == "full"
    block = train_config(subject, "block")
    assert (block.method.name, block.support, block.block_size) == ("sltrain", "block", 16)
    assert train_config(subject, "checkpointing").activation_checkpointing
    assert not train_config(subject, "uniform").activation_checkpointing
    published = build_stepper(subject, "transformers_published").model
    assert sum(isinstance(module, PublishedLinear) for module in published.modules()) == 4 * 7


@pytest.mark.parametrize("name", ["uniform", "column", "transformers_published"])
def test_updates_learn(name: str) -> None:
    """What is timed is training: the loss of the same rows falls."""
    stepper = build_stepper(bench(), name)
    ids = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = [stepper.update(ids) for _ in range(4)]
    numbers = [loss if isinstance(loss, float) else loss.loss for loss in losses]
    assert numbers[-1] < numbers[0]


# (arguments, words the message must hold)
BAD: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["what=layer", "what=step"]),
    "unknown what": (["what=lyer"], ["what=lyer", "layer"]),
    "unknown key": (["wat=layer"], ["wat", "what"]),
    "unknown candidate": (["what=layer", "candidates=[dens]"], ["dens", "dense"]),
    "candidate of another": (["what=layer", "candidates=[full]"], ["full", "what=layer"]),
    "no candidates": (["what=layer", "candidates=[]"], ["candidates=[]", "dense"]),
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
        line = next(line for line in out.splitlines() if line.split()[:1] == [item.name])
        assert len(line.split()) > 2, line


def test_every_key_is_read_and_every_scope_is_a_key() -> None:
    package = Path(__file__).resolve().parents[2] / "sltrain"
    text = "".join(file.read_text() for file in [package / "commands" / "bench.py", *package.glob("api/bench*.py")])
    keys = {item.name for item in fields(BenchConfig)}
    assert not [key for key in keys if f"config.{key}" not in text]
    assert set(SCOPE) <= keys
