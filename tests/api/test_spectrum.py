"""What is found in a real run, against NumPy on matrices put together from its checkpoint by hand."""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sltrain.api import spectrum as build_spectrum
from sltrain.api.report import read_report, write_report
from sltrain.api.spectrum import choose_layers, look_inside
from sltrain.building.saved import open_saved
from sltrain.layers.support import make_support
from sltrain.methods.sltrain import SUPPORTS
from sltrain.models.llama import PROJECTIONS
from sltrain.reporting.spectrum import aligned

Train = Callable[..., tuple[int, str, str]]
RANK, ALPHA = 8, 16.0


def train(sltrain_train: Train, tiny: list[str], run: Path, *more: str) -> Path:
    code, _, err = sltrain_train(*tiny, f"alpha={ALPHA}", "sparsity=0.1", *more, f"run_dir={run}")
    assert code == 0, err
    return run


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def values_in(lines: list[dict[str, str]], step: int, layer: str, matrix: str) -> list[float]:
    """Those of one matrix, and that they are numbered from 1."""
    own = [line for line in lines if (line["step"], line["layer"], line["matrix"]) == (str(step), layer, matrix)]
    assert [int(line["index"]) for line in own] == list(range(1, len(own) + 1))
    return [float(line["singular_value"]) for line in own]


def numpy_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("support", SUPPORTS)
def test_values_and_energies_of_a_run(
    support: str, sltrain_train: Train, tiny: list[str], tmp_path: Path, lines: list[str]
) -> None:
    run = train(sltrain_train, tiny, tmp_path / "run", f"support={support}", "rank_overrides={k_proj: 4}")
    lines.clear()
    section = look_inside(run)
    assert len(lines) == 1 and "14 of 14" in lines[0]

    tensors, singular = tensors_of(run, 6), read_csv(section.texts["spectrum.csv"])
    energies = {line["layer"]: line for line in read_csv(section.texts["energy.csv"])}
    table = section.tables[1]
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    assert sorted(energies) == sorted(names) and len(names) == 14  # in two layers first, middle and last are all
    assert len(table.rows) == 14 and {line["layer"] for line in singular} == set(names)
    for name in names:
        B, A = (tensors[f"{name}.{leaf}"].double().numpy() for leaf in "BA")
        own_rank = 4 if name.endswith("k_proj") else RANK
        low_rank = ALPHA / own_rank * B @ A
        sparse = np.zeros(low_rank.size)
        kept = make_support(*low_rank.shape, 0.1, support)
        sparse[kept.positions(tensors[f"{name}.indices"]).numpy()] = tensors[f"{name}.values"].double().numpy()
        sparse = sparse.reshape(low_rank.shape)

        whole = numpy_values(low_rank + sparse)
        tolerance = {"rtol": 1e-9, "atol": 1e-12}
        np.testing.assert_allclose(values_in(singular, 6, name, "W"), whole, **tolerance)
        np.testing.assert_allclose(values_in(singular, 6, name, "BA"), numpy_values(low_rank)[:own_rank], **tolerance)
        np.testing.assert_allclose(values_in(singular, 6, name, "S"), numpy_values(sparse), **tolerance)

        line, (dense, rest) = energies[name], (np.linalg.norm(low_rank) ** 2, np.linalg.norm(sparse) ** 2)
        assert float(line["low_rank_energy"]) == pytest.approx(dense, rel=1e-4)
        assert float(line["sparse_energy"]) == pytest.approx(rest, rel=1e-5)
        assert float(line["sparse_share"]) == pytest.approx(rest / (dense + rest), rel=1e-4)
        assert (line["projection"], line["depth"]) == (name.split(".")[4], name.split(".")[2])

        row = dict(zip(table.headings, next(row for row in table.rows if row[1] == name), strict=True))
        assert row["rank"] == str(own_rank) and row["of"] == "32"
        assert float(row["largest"]) == pytest.approx(whole[0], rel=6e-3)
        assert float(row["cliff"]) == pytest.approx(whole[own_rank - 1] / whole[own_rank], rel=6e-3)
        assert int(row["numerical rank"]) == np.linalg.matrix_rank(low_rank + sparse)
        shares = whole / whole.sum()
        entropy = -sum(share * math.log(share) for share in shares if share > 1e-12)
        assert float(row["effective rank"]) == pytest.approx(math.exp(entropy), rel=6e-3)
        assert float(row["energy in S"].removesuffix(" %")) == pytest.approx(100 * rest / (dense + rest), abs=0.06)


def test_what_lies_beside_the_page(sltrain_train: Train, tiny: list[str], tmp_path: Path) -> None:
    run = train(sltrain_train, tiny, tmp_path / "a run", "checkpoint_every=2", "keep_last=9")
    section, out = look_inside(run, steps=[6, 2, 6], layers=["v_proj"]), tmp_path / "out"
    write_report(read_report([run]), out, more=section)
    ours = {"spectrum_2.png", "spectrum_6.png", "energy.png", "spectrum.csv", "energy.csv", "spectrum.md"}
    assert {file.name for file in out.iterdir()} > ours
    for picture in section.pictures:
        assert (out / picture.file_name).read_bytes() == picture.png and picture.caption and picture.alt
    assert section.title == "Spectrum of a run"

    kinds, layers = section.tables
    assert [row[:4] for row in kinds.rows] == [["2", "v_proj", "2", "8"], ["6", "v_proj", "2", "8"]]
    shares = [
        float(line["sparse_share"])
        for line in read_csv((out / "energy.csv").read_text())
        if line["step"] == "6" and line["projection"] == "v_proj"
    ]
    assert float(kinds.rows[1][-1].removesuffix(" %")) == pytest.approx(100 * sum(shares) / 2, abs=0.06)  # of two
    assert len({len(line) for line in aligned(kinds).splitlines()}) == 1

    lines = [line for line in (out / "spectrum.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == kinds.headings and cells[2:4] == kinds.rows
    assert cells[4] == layers.headings and cells[6:] == layers.rows
    assert {row[0] for row in layers.rows} == {"2", "6"} and len(layers.rows) == 4

    values = read_csv((out / "spectrum.csv").read_text())
    first, last = (values_in(values, step, "model.layers.1.self_attn.v_proj", "BA") for step in (2, 6))
    assert 0 < first[0] < last[0]  # B starts at zero and has begun to grow

    write_report(read_report([run]), out)  # what an earlier report brought goes with it
    assert not {file.name for file in out.iterdir()} & ours


@pytest.mark.parametrize("method", ["low_rank", "full"])
def test_methods_without_a_sparse_part(method: str, sltrain_train: Train, tiny: list[str], tmp_path: Path) -> None:
    run = train(sltrain_train, tiny, tmp_path / "run", f"method={method}")
    section = look_inside(run, layers=["down_proj"])
    assert [picture.file_name for picture in section.pictures] == ["spectrum_6.png"]
    assert section.texts.keys() == {"spectrum.csv", "spectrum.md"}
    tensors, lines = tensors_of(run, 6), read_csv(section.texts["spectrum.csv"])
    name = "model.layers.1.mlp.down_proj"
    if method == "full":
        weight = tensors[f"{name}.weight"].double().numpy()
        assert {line["matrix"] for line in lines} == {"W"}
    else:
        weight = ALPHA / RANK * tensors[f"{name}.B"].double().numpy() @ tensors[f"{name}.A"].double().numpy()
        assert {line["matrix"] for line in lines} == {"W", "BA"}
        assert values_in(lines, 6, name, "BA") == values_in(lines, 6, name, "W")[:RANK]
        assert values_in(lines, 6, name, "W")[RANK:] == [0.0] * (32 - RANK)
    np.testing.assert_allclose(values_in(lines, 6, name, "W"), numpy_values(weight), rtol=1e-9, atol=1e-12)
    row = dict(zip(section.tables[1].headings, section.tables[1].rows[1], strict=True))
    assert (row["rank"], row["cliff"], row["energy in S"]) == (
        ("-", "-", "-") if method == "full" else ("8", "inf", "-")
    )
    assert row["numerical rank"] == ("32" if method == "full" else "8")


def test_a_sparse_part_alone_and_none(sltrain_train: Train, tiny: list[str], tmp_path: Path) -> None:
    overrides = ["rank_overrides={q_proj: 0}", "sparsity_overrides={v_proj: 0}"]
    run = train(sltrain_train, tiny, tmp_path / "run", *overrides)
    section = look_inside(run, layers=["q_proj", "v_proj"])
    lines = read_csv(section.texts["spectrum.csv"])
    sparse_alone, product_alone = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    assert {line["matrix"] for line in lines if line["layer"] == sparse_alone} == {"W", "S"}
    assert values_in(lines, 6, sparse_alone, "W") == values_in(lines, 6, sparse_alone, "S")
    assert {line["matrix"] for line in lines if line["layer"] == product_alone} == {"W", "BA"}
    shares = {row[1]: row[-1] for row in section.tables[1].rows}
    assert shares[sparse_alone] == "100.0 %" and shares[product_alone] == "0.0 %"
    alone = look_inside(run, layers=["q_proj"])
    assert "low-rank" not in alone.pictures[0].caption


# ---- what is chosen, and what is refused

NAMES = [
    f"model.layers.{depth}.{'self_attn' if kind in PROJECTIONS[:4] else 'mlp'}.{kind}"
    for kind in PROJECTIONS
    for depth in range(9)
]


def test_first_middle_and_last_layer_are_the_default() -> None:
    chosen = choose_layers(NAMES, None)
    assert len(chosen) == 21 and {name.split(".")[2] for name in chosen} == {"0", "4", "8"}
    assert choose_layers(NAMES, []) == chosen
    assert choose_layers(NAMES[:1], None) == NAMES[:1]


def test_patterns_choose_in_the_order_of_the_model() -> None:
    assert choose_layers(NAMES, ["mlp"]) == [name for name in NAMES if ".mlp." in name]
    assert choose_layers(NAMES, ["*.8.*.v_proj", "q_proj", "q_*"]) == [*NAMES[:9], "model.layers.8.self_attn.v_proj"]


def test_a_pattern_that_fits_nothing_is_refused_with_examples() -> None:
    with pytest.raises(ValueError, match="'lm_head' fits no projection.*model.layers.0.self_attn.q_proj.*down_proj"):
        choose_layers(NAMES, ["q_proj", "lm_head"])


def test_what_cannot_be_had_is_refused(sltrain_train: Train, tiny: list[str], tmp_path: Path) -> None:
    run = train(sltrain_train, tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint of step 5; there are: 6"):
        look_inside(run, steps=[5])
    with pytest.raises(ValueError, match="fits no projection"):
        look_inside(run, layers=["nothing"])
    with pytest.raises(ValueError, match="does not exist"):
        look_inside(tmp_path / "missing")


@pytest.mark.parametrize("method", ["cola", "lost method.activation=silu"])
def test_layers_that_are_not_one_matrix_are_refused_before_any_work(
    method: str,
    sltrain_train: Train,
    tiny: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sltrain.commands.report import run_command

    monkeypatch.setattr(build_spectrum, "_read_layer", lambda *arguments: pytest.fail("a layer was read"))
    run = train(sltrain_train, tiny, tmp_path / "run", *f"max_steps=1 warmup_steps=0 method={method}".split())
    capfd.readouterr()
    assert run_command([str(run), "--spectrum"]) == 2
    out, err = capfd.readouterr()
    name = method.partition(" ")[0]
    line = f"error: model.layers.0.self_attn.q_proj: a layer of kind {name} is not one matrix, so there is no one W\n"
    assert (out, err) == ("", line) and not (run / "report").exists()


def test_a_step_that_cannot_be_had_costs_only_itself(
    sltrain_train: Train, tiny: list[str], tmp_path: Path, lines: list[str]
) -> None:
    run = train(sltrain_train, tiny, tmp_path / "run")
    lines.clear()
    found = look_inside(run, steps=[6, 5])
    assert {row[0] for row in found.tables[1].rows} == {"6"} and "no checkpoint of step 5; there are: 6" in lines[0]


def test_weights_that_are_not_finite_are_named(
    sltrain_train: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(sltrain_train, tiny, tmp_path / "run")
    opened = open_saved(run)
    tensors = tensors_of(run, 6)
    tensors["model.layers.1.mlp.up_proj.values"][3] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    opened.files = type(opened.files)(tmp_path)
    monkeypatch.setattr(build_spectrum, "open_saved", lambda *arguments: opened)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj holds weights that are not finite at step 6"):
        look_inside(run, layers=["q_proj"])


def test_one_layer_is_in_memory_at_a_time(
    sltrain_train: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model stays without memory, and a layer is gone when the next is read."""
    import weakref

    run = train(sltrain_train, tiny, tmp_path / "run")
    opened = open_saved(run)
    alive: list[weakref.ref[torch.nn.Module]] = []
    read = build_spectrum._read_layer

    def watched(*arguments: object) -> torch.nn.Module:
        assert all(reference() is None for reference in alive)
        layer = read(*arguments)  # type: ignore[arg-type]
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(build_spectrum, "_read_layer", watched)
    monkeypatch.setattr(build_spectrum, "open_saved", lambda *arguments: opened)
    look_inside(run, layers=["q_proj"])
    assert len(alive) == 14 and all(parameter.is_meta for parameter in opened.model.parameters())
