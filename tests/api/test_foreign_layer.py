"""A layer that the package does not know, a frozen W0 beside B A, walks through everything that is done with a run: it
is trained, planned, reported, exported, opened and looked into; and a wrong export of it is found out."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from toy_layers import Adapted, ReLoRALinear, SilentLinear, TwoMatrices, instead_of_low_rank

import sltrain
from sltrain.api import export as build_export
from sltrain.api.export import export
from sltrain.api.report import count_parameters_of
from sltrain.api.spectrum import look_inside
from sltrain.building.saved import open_saved
from sltrain.commands.train import run_command as train

RANK, ALPHA = 8, 16.0
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", autouse=True)
def relora() -> Iterator[None]:
    """method=low_rank makes these layers here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sltrain.layers.LowRankLinear", instead_of_low_rank(ReLoRALinear))
        yield


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = ["method=low_rank", f"alpha={ALPHA:g}", "lr=0.05", "model.initializer_range=0.3"]
    arguments = [*tiny, *recipe, f"run_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sltrain-train", *arguments])
        assert train(arguments) == 0
    return folder


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


def by_hand(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    W0, B, A = (tensors[f"{name}.{leaf}"].double() for leaf in ("weight", "B", "A"))
    return W0 + ALPHA / RANK * B @ A


def test_only_what_is_trained_moves_and_counts(run: Path) -> None:
    tensors = tensors_of(run)
    start = open_saved(run).model
    start.to_empty(device="cpu").init_weights(42)
    assert torch.equal(start.get_submodule(NAME).weight, tensors[f"{NAME}.weight"])
    assert not torch.equal(start.get_submodule(NAME).A, tensors[f"{NAME}.A"])
    frozen = sum(tensor.numel() for name, tensor in tensors.items() if "_proj.weight" in name)
    trained = sum(tensor.numel() for tensor in tensors.values()) - frozen
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_parameters"]["frozen"] == frozen > 10_000
    assert summary["num_parameters"]["total"] == trained == count_parameters_of(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "train"][-1]
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    products = [np.linalg.norm(by_hand(tensors, name) - tensors[f"{name}.weight"].double()) for name in names]
    assert last["low_rank_norm"] == pytest.approx(np.linalg.norm(products), rel=1e-4)
    dense = np.linalg.norm([tensors[f"{name}.weight"].norm() for name in names])
    assert last["dense_norm"] == pytest.approx(dense, rel=1e-4) and last["sparse_norm"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_export_is_w0_plus_the_product(run: Path, tmp_path: Path, dtype: torch.dtype, lines: list[str]) -> None:
    export(open_saved(run), tmp_path / "model", "dense", dtype)
    said = "\n".join(lines)
    assert "verified   logits differ by" in said and ("from the rounded" in said) == (dtype == torch.bfloat16)
    tensors, exported = tensors_of(run), load_file(tmp_path / "model/model.safetensors")
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for name in (NAME, "model.layers.0.self_attn.q_proj"):
        W = by_hand(tensors, name)
        torch.testing.assert_close(exported[f"{name}.weight"].double(), W, rtol=tolerance, atol=1e-6)
        assert (W - tensors[f"{name}.weight"]).norm() > 0.1 * W.norm()
    if dtype == torch.float32:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        ids = torch.arange(40)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, sltrain.load(run)(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compressed_export_names_the_kind_and_opens(run: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    export(open_saved(run), tmp_path / "small", "compressed", dtype)
    content = json.loads((tmp_path / "small/config.json").read_text())
    facts = content["sltrain"]
    assert facts["format_version"] == 3
    assert facts["layers"][NAME] == {"kind": "toy_relora", "rank": RANK, "alpha": ALPHA}
    opened, ids = sltrain.load(tmp_path / "small"), torch.arange(40)[None]
    assert isinstance(opened.get_submodule(NAME), ReLoRALinear)
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(opened(ids), sltrain.load(run)(ids))
    card = (tmp_path / "small/README.md").read_text()
    assert "W = W0 + (alpha / rank) B A." in card and "| `NAME.weight` | | frozen |" in card
    assert "its kind, rank, alpha." in card and " frozen |" in card
    assert "auto_map" not in content and not (tmp_path / "small/modeling_sltrain.py").exists(), "it knows no such layer"
    assert "library_name: sltrain" in card and "transformers import" not in card


def without_product(layer: ReLoRALinear) -> torch.Tensor:
    return layer.weight.detach()


def scaled(layer: ReLoRALinear) -> torch.Tensor:
    return layer.weight.detach() + 1.05 * layer.scale * layer.B.detach() @ layer.A.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [without_product, scaled], ids=lambda function: function.__name__)
def test_a_wrong_merge_is_not_exported(
    wrong: Callable, dtype: torch.dtype, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReLoRALinear, "dense_weight", wrong)
    with pytest.raises(AssertionError, match="_proj.weight is another one: W x differs"):
        export(open_saved(run), tmp_path / "model", "dense", dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copy_under_the_same_name_is_not_taken_for_a_merge(
    dtype: torch.dtype, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_export, "_dense", lambda saved, name: saved.files.read(name))
    with pytest.raises(AssertionError, match="_proj.weight is another one: W x differs"):
        export(open_saved(run), tmp_path / "model", "dense", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_a_wrong_configuration_is_found_in_the_logits(
    format: str, dtype: torch.dtype, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is right, and rounding moves the logits more than this does."""
    right = build_export.llama_config

    def wrong(*arguments: Any) -> dict[str, Any]:
        return {**right(*arguments), "rope_theta": 9500.0}

    monkeypatch.setattr(build_export, "llama_config", wrong)
    with pytest.raises(AssertionError, match="the exported model is another one: logits differ"):
        export(open_saved(run), tmp_path / "model", format, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_setting_of_a_compressed_layer_is_found(
    dtype: torch.dtype, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rank": RANK, "alpha": ALPHA * 1.001}
    monkeypatch.setattr(ReLoRALinear, "settings", lambda layer: settings)
    with pytest.raises(AssertionError, match="the exported model is another one: logits differ"):
        export(open_saved(run), tmp_path / "model", "compressed", dtype)


def test_the_spectrum_is_that_of_the_whole_w(run: Path) -> None:
    section = look_inside(run, layers=["up_proj"])
    lines = list(csv.DictReader(io.StringIO(section.texts["spectrum.csv"])))
    tensors = tensors_of(run)
    W = by_hand(tensors, NAME).numpy()
    for matrix, dense in {
        "W": W,
        "W0": tensors[f"{NAME}.weight"].double().numpy(),
        "BA": W - tensors[f"{NAME}.weight"].double().numpy(),
    }.items():
        found = [float(line["singular_value"]) for line in lines if (line["layer"], line["matrix"]) == (NAME, matrix)]
        assert len(found) == (RANK if matrix == "BA" else 32)
        expected = np.linalg.svd(dense, compute_uv=False)[: len(found)]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert "energy.csv" not in section.texts and section.tables[1].rows[1][2] == str(RANK)


@pytest.mark.parametrize("kind", [SilentLinear, Adapted], ids=lambda kind: kind.__name__)
def test_nothing_is_said_of_a_layer_that_is_not_known(
    kind: type[nn.Module], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_saved(run)
    opened.model.get_submodule(NAME.rpartition(".")[0]).up_proj = kind(32, 64)
    monkeypatch.setattr("sltrain.api.spectrum.open_saved", lambda *arguments: opened)
    with pytest.raises(ValueError, match=f"{NAME}.*{kind.__name__}"):
        look_inside(run, layers=["up_proj"])
    monkeypatch.setattr("sltrain.building.model.build_model", lambda *arguments: opened.model)
    with pytest.raises(ValueError, match=f"{NAME}.*{kind.__name__}"):
        count_parameters_of(run)


def test_what_is_not_one_matrix_is_not_exported_dense(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr("sltrain.layers.LowRankLinear", instead_of_low_rank(TwoMatrices))
    with pytest.raises(ValueError, match="layers of kind toy_two_matrices are not one matrix each; use --format comp"):
        export(open_saved(run), tmp_path / "model", "dense", torch.float32)
    export(open_saved(run), tmp_path / "small", "compressed", torch.float32)
    assert isinstance(sltrain.load(tmp_path / "small").get_submodule(NAME), TwoMatrices)
    (note,) = [line for line in lines if line.startswith("note")]
    assert note.endswith("kind toy_two_matrices have no code for transformers: only sltrain.load opens it")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "kind toy_two_matrices have no code for transformers" in card and "--format dense" not in card
