"""support=topk: S lies where NumPy finds the largest entries of what a trained W has beyond a low rank."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sltrain
from sltrain.building.saved import open_saved
from sltrain.commands.train import run_command as train
from sltrain.layers import SLTrainLinear

Run = Callable[..., tuple[int, str, str]]
DOWN = "model.layers.1.mlp.down_proj"  # wide: it has more inputs than outputs


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def positions(run: Path) -> dict[str, list[int]]:
    """Flat positions of each S of a run, by its checkpoint's rows and columns."""
    found = {}
    for name, indices in load_file(newest(run) / "model.safetensors").items():
        if name.endswith(".indices"):
            layer = open_saved(run).model.get_submodule(name.removesuffix(".indices"))
            assert isinstance(layer, SLTrainLinear)
            rows = layer.out_features
            words = indices[: 2 * (rows + 1)].numpy().view(np.int32)
            columns = indices[2 * (rows + 1) :].numpy().astype(np.int64)
            row_of = np.repeat(np.arange(rows), np.diff(words))
            found[name.removesuffix(".indices")] = (row_of * layer.in_features + columns).tolist()
    return found


def assert_largest(places: list[int], matrix: np.ndarray, count: int) -> None:
    """These are the largest entries of the matrix; some that differ by rounding may have changed places."""
    size, chosen = np.abs(matrix).ravel(), np.zeros(matrix.size, dtype=bool)
    chosen[places] = True
    assert chosen.sum() == len(places) == count
    assert size[chosen].min() >= (1 - 1e-4) * size[~chosen].max()


@pytest.fixture(scope="module")
def sources(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Options -> a run of two updates with them."""
    made: dict[str, Path] = {}

    def make(options: str) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("source") / "run"
            short = [*tiny, "max_steps=2", "lr=0.05", "eval_every=0", *options.split()]
            assert train([*short, f"run_dir={made[options]}"]) == 0
        return made[options]

    return make


def topk(source: Path, *options: str) -> list[str]:
    return ["support=topk", f"support_from={source}", "sparsity=0.05", "max_steps=2", *options]


@pytest.mark.parametrize("rank", [0, 4])
def test_a_dense_runs_residual_chooses(
    rank: int, tiny: list[str], sources: Callable, sltrain_train: Run, tmp_path: Path
) -> None:
    source, run = sources("method=full"), tmp_path / "run"
    code, out, err = sltrain_train(*tiny, *topk(source, f"rank={rank}"), f"run_dir={run}")
    assert code == 0 and f"support    topk of {source}: S lies on" in out, err
    weights = load_file(newest(source) / "model.safetensors")
    found = positions(run)
    assert len(found) == 14
    for name, places in found.items():
        left, values, right = np.linalg.svd(weights[f"{name}.weight"].double().numpy(), full_matrices=False)
        rest = (left[:, rank:] * values[rank:]) @ right[rank:]
        assert_largest(places, rest, int(0.05 * rest.size))


def test_the_s_of_an_sltrain_run_chooses_in_its_precision(
    tiny: list[str], sources: Callable, sltrain_train: Run, tmp_path: Path
) -> None:
    """Another rank and half of its entries: those of S with the largest values."""
    source, run = sources("method=sltrain rank=6 sparsity=0.1"), tmp_path / "run"
    code, _, err = sltrain_train(*tiny, *topk(source, "rank=4"), f"run_dir={run}")
    assert code == 0, err
    weights, at = load_file(newest(source) / "model.safetensors"), positions(source)
    for name, places in positions(run).items():
        values = weights[f"{name}.values"].abs().numpy()
        order = np.argsort(-values, kind="stable")[: len(places)]
        assert places == sorted(np.array(at[name])[order].tolist()), name


def test_with_init_from_it_is_the_nearest_low_rank_matrix_and_the_largest_of_the_rest(
    tiny: list[str], sources: Callable, sltrain_train: Run, tmp_path: Path
) -> None:
    source, run = sources("method=full"), tmp_path / "run"
    start = [f"init_from={source}", "model=llama_tiny", "lr=1e-12", "rank=4"]
    code, _, err = sltrain_train(*tiny, *topk(source, *start), f"run_dir={run}")
    assert code == 0, err
    found, weights = sltrain.load(run), load_file(newest(source) / "model.safetensors")
    for name, places in positions(run).items():
        W, ours = weights[f"{name}.weight"].numpy(), found.get_submodule(name).dense_weight().numpy()
        left, values, right = np.linalg.svd(W, full_matrices=False)
        wanted = (left[:, :4] * values[:4]) @ right[:4]
        wanted.ravel()[places] = W.ravel()[places]
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_nothing_reads_the_source_once_the_run_has_begun(
    tiny: list[str], sources: Callable, sltrain_train: Run, tmp_path: Path
) -> None:
    source, run, again = tmp_path / "source", tmp_path / "run", tmp_path / "again"
    shutil.copytree(sources("method=full"), source, symlinks=True)
    recipe = [*topk(source), "max_steps=4", "checkpoint_every=2"]
    assert sltrain_train(*tiny, *recipe, f"run_dir={run}")[0] == 0
    shutil.rmtree(source)
    shutil.copytree(run, again, symlinks=True)
    shutil.rmtree(newest(again))
    (again / "summary.json").unlink()
    code, out, err = sltrain_train(f"run_dir={again}")
    assert code == 0 and "from step 2" in out and "topk" not in out, err
    ours, theirs = (load_file(newest(folder) / "model.safetensors") for folder in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    sltrain.export(run, tmp_path / "small", format="compressed")
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(sltrain.load(tmp_path / "small")(ids), sltrain.load(run)(ids))
    code, out, err = sltrain_train(f"init_from={run}", "max_steps=2", f"run_dir={tmp_path / 'more'}")
    assert code == 0 and "all weights copied" in out, err
    assert positions(tmp_path / "more") == positions(run)


@pytest.mark.slow
def test_two_ranks_choose_what_one_chooses(
    tiny: list[str], sources: Callable, fork_train: Callable, tmp_path: Path
) -> None:
    found = []
    for num_ranks in (1, 2):
        run = tmp_path / str(num_ranks)
        process = fork_train(*tiny, *topk(sources("method=full")), f"run_dir={run}", num_ranks=num_ranks)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(positions(run))
    assert found[0] == found[1]


BAD = {
    "no source": ("method=full", ["support_from=null"], "add support_from=RUN"),
    "another support": ("method=full", ["support=block"], "is for support=topk, and support is block"),
    "another method": ("method=full", ["method=full"], "is for method=sltrain, and method=full has no such S"),
    "no such folder": ("method=full", ["support_from=/nowhere/at/all"], "there is no such folder here"),
    "another shape": ("method=full", ["model.intermediate_size=48"], "type model.intermediate_size=64"),
    "too few entries": ("method=sltrain rank=6 sparsity=0.02", [], "trains 20 entries of S there, 51 are wanted"),
    "no S": ("method=full", ["sparsity=0"], "support=topk with sparsity=0 has no S to place"),
    "nothing left": ("method=low_rank rank=4", ["rank=4"], "has no more than rank 4 there"),
    "no matrix": ("method=cola rank=4", [], "of kind cola there, which is not one matrix"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_choose_is_refused_in_a_line(
    name: str, tiny: list[str], sources: Callable, sltrain_train: Run, tmp_path: Path
) -> None:
    options, typed, words = BAD[name]
    code, out, err = sltrain_train(*tiny, *topk(sources(options)), *typed, f"run_dir={tmp_path / 'run'}")
    assert code == 2 and words in err and err.count("\n") <= 2, err
    assert not (tmp_path / "run").exists()


def test_positions_that_come_with_the_weights_are_not_chosen(
    tiny: list[str], sources: Callable, sltrain_train: Run, tmp_path: Path
) -> None:
    own = sources("method=sltrain rank=8 sparsity=0.05")
    typed = [*topk(sources("method=full")), f"init_from={own}", "model=llama_tiny"]
    code, _, err = sltrain_train(*tiny, *typed, f"run_dir={tmp_path / 'run'}")
    assert code == 2 and "type support=uniform support_from=null" in err, err
