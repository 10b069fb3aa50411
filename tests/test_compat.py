"""What older code has saved goes on: runs that were stopped in the middle, and exports, as files of this repository.

    compat/text/             the text and the tokenizer of all of them, see recorded.py
    compat/runs/NAME/        a run folder as a process leaves it that is killed after the checkpoint of step 5 of 10
    compat/straight.json     machine and numbers of the same runs when nothing stops them
    compat/exports/FORMAT/   "sltrain" exported by `sltrain-export --format FORMAT`
    compat/logits.json       what the trained model gives for some ids

They were made by the code of commit fc16b52 and stand for everything trained before formats changed, so they are never
made again: code that cannot continue them is wrong, or has to translate. What made them, in tests/compat, with the
overrides BASE and those of NAME in RECIPES below:

    sltrain-train BASE RECIPE run_dir=runs/NAME
    sltrain-export runs/sltrain --output exports/FORMAT --format FORMAT

Every run went to its end, and its numbers were kept. Then its folder was put back to where it was after step 5: without
the checkpoint of step 10, summary.json, and the lines of metrics.jsonl that follow the first checkpoint's.

    python tests/test_compat.py --write    # makes what is missing: a run or an export of a format that is new

If an override gets another name, it gets it in the recipe; config.yaml of the stored folder keeps the old one.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from recorded import TEXT, TOLERANCES, differences, dump, is_coarse, machine, numbers_of, train

import sltrain

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "compat"
STRAIGHT, LOGITS = FOLDER / "straight.json", FOLDER / "logits.json"

BASE = [
    "model=llama_tiny",
    "model.intermediate_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    *TEXT,
    "seq_len=16",
    "global_batch_size=8",
    "micro_batch_size=4",
    "max_steps=10",
    "warmup_steps=2",
    "lr=0.02",
    "log_every=1",
    "eval_every=0",
    "checkpoint_every=5",
    "device=cpu",
    "memory_guard=false",
]
NARROW = ["model.hidden_size=8"]
WIDE = ["model.hidden_size=32"]  # 128 x 32 embeddings: the least that gets 8-bit moments
SPARSE = ["method=sltrain", "rank=3", "sparsity=0.1", "layer_path=factored"]
RECIPES = {
    "sltrain": [*NARROW, *SPARSE],
    "adam8bit_in_backward": [*WIDE, *SPARSE, "support=stratified", "optimizer=adam8bit", "per_layer_update=true"],
    "low_rank": [*NARROW, "method=low_rank", "rank=3"],
    "full": [*NARROW, "method=full"],
    "bfloat16_rounded": [*NARROW, *SPARSE, "support=block", "dtype=bfloat16", "stochastic_rounding=true"],
    "column_alone_pack": [*NARROW, *SPARSE, "support=column", "rank=0", "padding=pack", "micro_batch_size=8"],
}
EXPORTED = "sltrain"
FORMATS = ("dense", "compressed")
IDS = [[5, 17, 90, 127]]


def export(run: Path, output: Path, format: str) -> int:
    """Run `sltrain-export`."""
    from sltrain.commands.export import run_command

    return int(run_command([str(run), "--output", str(output), "--format", format]))


def logits_of(folder: Path) -> list:
    model = sltrain.load(folder)
    with torch.no_grad():
        return model(torch.tensor(IDS)).tolist()


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


@pytest.fixture
def stopped(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the stored run of that name."""
    return Path(shutil.copytree(FOLDER / "runs" / request.param, tmp_path / "run"))


@pytest.mark.parametrize(("name", "stopped"), [(name, name) for name in RECIPES], indirect=["stopped"])
def test_a_stored_run_goes_on_as_if_it_had_not_stopped(name: str, stopped: Path) -> None:
    before = (stopped / "metrics.jsonl").read_text()
    code, said = train(*BASE, *RECIPES[name], f"run_dir={stopped}")
    assert code == 0, said
    assert "from step 5" in said
    assert (stopped / "metrics.jsonl").read_text().startswith(before)
    assert (stopped / "summary.json").exists() and checkpoint(stopped, 10).exists()

    straight = json.loads(STRAIGHT.read_text())[name]
    is_here = straight["machine"] == machine()
    tolerance = None if is_here else TOLERANCES["coarse" if is_coarse(RECIPES[name]) else "float32"]
    wrong = differences(numbers_of(stopped), straight["numbers"], tolerance)
    assert not wrong, f"{name}, tolerance {tolerance}:\n" + "\n".join(wrong[:6])


@pytest.mark.parametrize("stopped", ["sltrain"], indirect=True)
@pytest.mark.parametrize(
    "option", ["method.alpha=999", "method.support=stratified", "method.rank=1", "alpha=999", "schedule=linear"]
)
def test_a_stored_run_does_not_continue_with_another_option(option: str, stopped: Path) -> None:
    """Its config.yaml has options at the root only; the method's own are compared all the same."""
    code, said = train(*BASE, *RECIPES["sltrain"], option, f"run_dir={stopped}")
    assert code == 2 and f"{option.partition('=')[0]} was" in said, said
    assert not (stopped / "summary.json").exists()


@pytest.mark.parametrize(("name", "stopped"), [(name, name) for name in RECIPES], indirect=["stopped"])
def test_a_stored_run_is_opened_and_exported(name: str, stopped: Path, tmp_path: Path) -> None:
    """At step 5. Export itself holds its files against the trained model."""
    logits = torch.tensor(logits_of(stopped))
    assert logits.shape == (1, 4, 128) and bool(logits.isfinite().all())
    assert export(stopped, tmp_path / "dense", "dense") == 0
    rounded_twice = name == "bfloat16_rounded"  # B A + S is rounded there once more
    tolerance = {"atol": 0.1, "rtol": 0.1} if rounded_twice else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(torch.tensor(logits_of(tmp_path / "dense")), logits, **tolerance)


@pytest.mark.parametrize("format", FORMATS)
def test_a_stored_export_gives_the_logits_of_its_run(format: str) -> None:
    found, wanted = torch.tensor(logits_of(FOLDER / "exports" / format)), torch.tensor(json.loads(LOGITS.read_text()))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stopped", [EXPORTED], indirect=True)
def test_a_stored_run_gives_these_logits_too(stopped: Path) -> None:
    wanted = torch.tensor(json.loads(LOGITS.read_text()))
    torch.testing.assert_close(torch.tensor(logits_of(stopped)), wanted, atol=1e-5, rtol=1e-5)


def test_nothing_stored_names_a_place_on_the_machine_it_was_made_on() -> None:
    texts = [
        *FOLDER.rglob("config.yaml"),
        *FOLDER.rglob("metrics.jsonl"),
        *FOLDER.rglob("*.json"),
        *FOLDER.rglob("*.md"),
    ]
    assert len(texts) > 2 * len(RECIPES)
    assert not [path for path in texts if str(Path(__file__).parents[1]) in path.read_text()]


def write() -> None:
    """Make the runs and exports that are not there."""
    straight = json.loads(STRAIGHT.read_text()) if STRAIGHT.exists() else {}
    for name, recipe in RECIPES.items():
        run = FOLDER / "runs" / name
        if run.exists():
            continue
        code, said = train(*BASE, *recipe, f"run_dir=runs/{name}")
        assert code == 0, said
        straight[name] = {"machine": machine(), "numbers": numbers_of(run)}
        shutil.rmtree(checkpoint(run, 10))
        (run / "checkpoints" / "latest").unlink()  # the link; only people read it
        (run / "summary.json").unlink()
        (run / ".lock").unlink()  # of a process that is gone
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:6]
        assert [json.loads(line)["event"] for line in lines] == ["train"] * 5 + ["checkpoint"]
        (run / "metrics.jsonl").write_text("".join(lines))
        print("made", run)
    STRAIGHT.write_text(dump(straight, depth=3))
    for format in FORMATS:
        output = FOLDER / "exports" / format
        if not output.exists():
            assert export(FOLDER / "runs" / EXPORTED, output, format) == 0
    if not LOGITS.exists():
        short = [[[float(f"{x:.6g}") for x in row] for row in rows] for rows in logits_of(FOLDER / "runs" / EXPORTED)]
        LOGITS.write_text(json.dumps(short) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
