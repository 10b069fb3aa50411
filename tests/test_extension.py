"""What another package brings works like what is built in: tests/outsider is installed into a folder of its own, and
its method, layer, optimizer and source train, plan, resume, report, export and sweep."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import lines, resumes_bit_for_bit

import sltrain
from sltrain.commands import export, plan, report
from sltrain.compose import PLUGINS, TRAIN, compose_config
from sltrain.layers import LAYERS
from sltrain.methods.base import METHODS

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
BASE = [
    "method=merged",
    "optimizer=columns",
    "data=numbers",
    "tokenizer=bpe:300",
    "model=llama_tiny",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "rank=4",
    "seq_len=32",
    "global_batch_size=8",
    "micro_batch_size=4",
    "max_steps=8",
    "warmup_steps=2",
    "log_every=1",
    "eval_every=0",
    "eval_tokens=500",
    "device=cpu",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in it."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(Path(__file__).parent / "outsider", tmp_path_factory.mktemp("source") / "outsider")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def outsider(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The package as one that this process can import, and forgets after the test."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield site
    for registry in (*PLUGINS.values(), LAYERS):
        for name in [n for n, cls in registry._classes.items() if cls.__module__.startswith("sltrain_outsider")]:
            del registry._classes[name]
    for name in [name for name in sys.modules if name.startswith("sltrain_outsider")]:
        del sys.modules[name]


@pytest.fixture
def trained(outsider: Path, sltrain_train: Run) -> Path:
    """A finished run of 8 updates: W0 alone until update 4, then B and A, merged after update 6. The first test that
    asks makes it for all."""
    run = outsider.with_name("run")
    code, _, err = sltrain_train(*BASE, f"run_dir={run}", "checkpoint_every=1", "keep_last=99")
    assert code == 0, err
    return run


def test_help_and_typos_know_it(outsider: Path, sltrain_train: Run) -> None:
    _, out, _ = sltrain_train("--help")
    assert "method=merged: rank, alpha" in out and re.search(r"merge_every=\d+ +updates between merges", out)
    assert "optimizer=columns" in out and "num_documents" in out
    for typed, hint in {
        "method=mergd": "did you mean method=merged",
        "method.merge_evry=2": "did you mean method.merge_every",
        "method=full method.merge_every=2": "method=full has no such option; it belongs to method=merged",
        "method.merge_every=0": "method.merge_every=0: must be at least 1",
        "method.merge_every=soon": "method.merge_every=soon",
    }.items():
        code, _, err = sltrain_train(*BASE, *typed.split())
        assert code == 2 and hint in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("more", "at"),
    [
        ([], {3, 4, 5, 6}),
        (["optimizer=adamw", "per_layer_update=true"], {6}),
        (["optimizer=adam8bit", "dtype=bfloat16", "stochastic_rounding=true"], {4}),
        (["per_layer_update=true", "dtype=bfloat16", "stochastic_rounding=true"], {4, 6}),
    ],
    ids=["columns", "per_layer", "pieces", "everything"],
)
def test_it_resumes_bit_for_bit_over_its_phase_and_actions(
    more: list[str], at: set[int], outsider: Path, sltrain_train: Run, tmp_path: Path
) -> None:
    resumes_bit_for_bit([*BASE, *more], sltrain_train, tmp_path, at)


def test_moments_of_merged_factors_are_reset_and_new_parameters_start_without(trained: Path) -> None:
    def state(step: int) -> dict[str, Any]:
        file = trained / "checkpoints" / f"step_{step:08d}" / "optimizer.pt"
        return torch.load(file, weights_only=True)["state"]

    counted = torch.load(trained / "checkpoints" / "step_00000008" / "action.count.pt", weights_only=True)
    assert counted == {"updates": 8}, "an action's state outlives a phase"
    factor = "model.layers.0.mlp.up_proj.A"
    assert [state(step).get(factor, {}).get("step") for step in (3, 4, 5, 6, 7, 8)] == [None, None, 1, None, 1, 2]
    assert [state(step).get("model.layers.0.mlp.up_proj.W0", {}).get("step") for step in (3, 4, 5)] == [3, None, None]


def test_the_plan_counts_each_phase(outsider: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    typed = [*BASE, "model.vocab_size=300", "device=cpu", "dtype=float32"]
    assert plan.run_command([*typed, "format=json"]) == 0
    warm = json.loads(capfd.readouterr().out.splitlines()[-1])
    others = [text for text in typed if not text.startswith("optimizer=")]
    assert plan.run_command([*others, "optimizer=columns,adamw", "format=json"]) == 0
    listed = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert listed["name"] == "optimizer=columns" and listed["groups"] == warm["groups"]
    assert listed["compared"]["optimizer=adamw"]["total_bytes"] != listed["total_bytes"]
    assert warm["groups"]["low_rank_weights"] == 0 and warm["groups"]["optimizer_state"] > 0
    assert plan.run_command([*typed, "method.warm_fraction=0", "format=json"]) == 0
    factored = json.loads(capfd.readouterr().out.splitlines()[-1])
    state = torch.load(trained / "checkpoints" / "step_00000008" / "optimizer.pt", weights_only=True)["state"]
    held = sum(t.numel() * t.element_size() for s in state.values() for t in s.values() if torch.is_tensor(t))
    assert factored["groups"]["optimizer_state"] == held
    assert factored["groups"]["low_rank_weights"] == 4 * sum(
        4 * (out + into) for out, into in [(32, 32)] * 8 + [(64, 32)] * 4 + [(32, 64)] * 2
    )
    assert plan.run_command([*typed, "measure=true", "method.warm_fraction=0", "format=json"]) == 0
    measured = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert measured["measured_bytes"] == pytest.approx(measured["total_bytes"], rel=0.25)


def test_reports_exports_and_spectra_know_nothing_of_it_and_work(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert report.run_command([str(trained), "--output", str(tmp_path / "page"), "--spectrum"]) == 0
    page = tmp_path / "page"
    assert "merged" in (page / "table.md").read_text() and "method.merge_every" in (page / "table.csv").read_text()
    assert {"W0", "BA"} <= set((page / "spectrum.csv").read_text().replace("\n", ",").split(","))
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = sltrain.load(trained)(ids)
    for format in ("dense", "compressed"):
        assert export.run_command([str(trained), "--output", str(tmp_path / format), "--format", format]) == 0
        assert "verified" in capfd.readouterr().out
        torch.testing.assert_close(sltrain.load(tmp_path / format)(ids), logits, rtol=1e-5, atol=1e-5)
    assert export.run_command([str(trained), "--output", str(tmp_path / "early"), "--step", "3"]) == 0  # W0 alone
    kinds = json.loads((tmp_path / "compressed" / "config.json").read_text())["sltrain"]["layers"].values()
    assert {layer["kind"] for layer in kinds} == {"merged"}
    found = opened_by_a_stranger(tmp_path / "compressed", tmp_path)
    torch.testing.assert_close(torch.tensor(found), sltrain.load(trained)(IDS), rtol=1e-4, atol=1e-4)


IDS = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(3))


def opened_by_a_stranger(folder: Path, scratch: Path) -> list:
    """The logits of IDS, by transformers and the files of the folder, where neither package can be imported."""
    code = (
        "import json, sys; sys.modules['sltrain'] = sys.modules['sltrain_outsider'] = None\n"
        "import torch, transformers\n"
        "ids = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(3))\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(json.dumps(model(ids).logits.tolist()))"
    )
    environment = {**os.environ, "HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_train_the_curve_of_one_over_its_phase_and_actions(
    outsider: Path, fork_train: Callable[..., Any], tmp_path: Path
) -> None:
    losses = []
    for num_ranks in (1, 2):
        run = tmp_path / f"{num_ranks}"
        process = fork_train(*BASE, "micro_batch_size=2", f"run_dir={run}", num_ranks=num_ranks)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        losses.append([numbers[1] for numbers in lines(run)])
    assert len(losses[0]) == 9 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_it_sweeps_in_processes_of_its_own(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path)}
    grid = ["-m", "method.merge_every=2,3", f"run_dir={tmp_path / 'sweep'}"]
    command = [sys.executable, "-m", "sltrain.train", *BASE, *grid]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("phase      factors begins after update 4") == 2
    head = next(line for line in done.stdout.splitlines() if "perplexity" in line and "run" in line)
    assert "merge every" in head, "the option that differs has a column"


def test_a_package_that_cannot_be_imported_is_named_only_to_who_chooses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (info / "entry_points.txt").write_text("[sltrain.methods]\nbroken = no_such_package.method\nodd = odd_method\n")
    (tmp_path / "odd_method.py").write_text(
        "from dataclasses import dataclass\nfrom sltrain.methods.base import METHODS, Method\n"
        "@METHODS.register('odd')\n@dataclass\nclass Odd(Method):\n    option: complex = 1j\n"
    )
    assert compose_config(["model=llama_tiny", "max_steps=1"], TRAIN).method.name == "sltrain"
    with pytest.raises(ValueError, match="method=broken: no_such_package.method cannot be imported"):
        compose_config(["model=llama_tiny", "max_steps=1", "method=broken"], TRAIN)
    with pytest.raises(ValueError, match="method=odd cannot be used: .*complex"):
        compose_config(["model=llama_tiny", "max_steps=1", "method=odd"], TRAIN)
    METHODS._classes.pop("odd")
