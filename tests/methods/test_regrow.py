"""An S that moves: its updates against a rewrite with dense masks, resuming across a move, two ranks, and refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import Adam, SmallRun, batch, leaf, method_of
from torch import Tensor

from sltrain.engine.actions import generator_for
from sltrain.layers import SLTrainLinear

Train = Callable[..., tuple[int, str, str]]
OPTIONS = {"rank": 3, "alpha": 6.0, "sparsity": 0.2, "support": "uniform"}


def moved(S: Tensor, mask: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """The mask after a move, place by place; S (out, in) with zeros outside of it."""
    flat, chosen = S.flatten().tolist(), mask.flatten().tolist()
    inside = [place for place, is_in in enumerate(chosen) if is_in]
    outside = [place for place, is_in in enumerate(chosen) if not is_in]
    count = int(fraction * len(inside))
    dropped = sorted(inside, key=lambda place: (abs(flat[place]), place))[:count]
    fresh = torch.randperm(len(outside), generator=generator, dtype=torch.int32)[:count].tolist()
    new = mask.flatten().clone()
    new[dropped] = False
    new[[outside[number] for number in fresh]] = True
    return new.view_as(mask)


def rewritten(run: SmallRun, steps: int, every: int, fraction: float) -> list[list[Tensor]]:
    """The dense W after each update: a dense S and dense moments, masked."""
    layers = [layer for layer in run.model.layers if isinstance(layer, SLTrainLinear)]
    own = [{"A": leaf(layer.A), "B": leaf(layer.B), "S": leaf(layer.parts()["S"].dense())} for layer in layers]
    masks = [each["S"].detach() != 0 for each in own]
    adam, found = Adam(), []
    for step in range(1, steps + 1):
        x, target = batch(step)
        W1, W2 = (2.0 * each["B"] @ each["A"] + each["S"] * mask for each, mask in zip(own, masks, strict=True))
        (torch.tanh(x @ W1.t()) @ W2.t() - target).square().mean().backward()
        adam.step({f"{i}{key}": each[key] for i, each in enumerate(own) for key in each}, 0.01)
        generator = generator_for(7, "regrow", step)
        for i, each in enumerate(own):
            if step % every == 0 and step <= 0.75 * steps:
                new = moved(each["S"].detach(), masks[i], fraction, generator)
                kept = new & masks[i]
                each["S"] = leaf(each["S"] * kept)
                count, m, v = adam.state[f"{i}S"]
                adam.state[f"{i}S"] = count, m * kept, v * kept
                masks[i] = new
        weights = [2.0 * each["B"] @ each["A"] + each["S"] * mask for each, mask in zip(own, masks, strict=True)]
        found.append([weight.detach() for weight in weights])
    return found


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("every", "fraction"), [(4, 0.2), (1, 0.5), (7, 0.9)])
def test_twenty_updates_are_those_of_dense_masks(every: int, fraction: float, per_layer: bool) -> None:
    """In float64, to 1e-9 relative."""
    method = method_of("sltrain", **OPTIONS, regrow_every=every, regrow_fraction=fraction)
    run, fresh = (SmallRun(method, max_steps=20, per_layer=per_layer) for _ in range(2))
    for wanted in rewritten(fresh, 20, every, fraction):
        run.update()
        for weight, other in zip(run.weights(), wanted, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)


def test_a_move_keeps_the_largest_and_grows_elsewhere() -> None:
    layer = SLTrainLinear(40, 30, 4, 0.1, 8.0, generator=torch.Generator().manual_seed(1))
    before, old = layer.parts()["S"].dense(), layer.support.positions(layer.indices).long()
    sources = layer.regrow(0.25, torch.Generator().manual_seed(2))
    after, new = layer.parts()["S"].dense(), layer.support.positions(layer.indices).long()
    assert (new.diff() > 0).all() and len(new) == len(old) == 120
    fresh = sources < 0
    assert fresh.sum() == 30 and not set(new[fresh].tolist()) & set(old.tolist())
    assert not layer.values[fresh].any() and torch.equal(new[~fresh], old[sources[~fresh]])
    kept = after != 0
    assert torch.equal(after[kept], before[kept]) and kept.sum() == 90
    assert before[kept].abs().min() >= before[(before != 0) & ~kept].abs().max()


def test_a_full_s_moves_as_far_as_there_is_room() -> None:
    layer = SLTrainLinear(10, 10, 0, 0.95, 1.0)
    old = set(layer.support.positions(layer.indices).tolist())
    layer.regrow(0.2, torch.Generator().manual_seed(2))
    new = set(layer.support.positions(layer.indices).tolist())
    assert len(new) == 95 and new - old == set(range(100)) - old


def test_nothing_moves_in_the_last_quarter_and_extending_knows_it() -> None:
    method = method_of("sltrain", **OPTIONS, regrow_every=3)
    run = SmallRun(method, 20)
    assert [step for step in range(1, 21) if run.schedule.is_due(step)] == [3, 6, 9, 12, 15]
    assert method.agrees(17, 20, 21) and not method.agrees(18, 20, 40) and method.agrees(14, 20, 40)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


MOVING = ["method.regrow_every=2", "sparsity=0.1", "max_steps=8"]


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_continues_with_the_same_bits_after_a_move(
    step: int, tiny: list[str], sltrain_train: Train, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    code, _, err = sltrain_train(*tiny, *MOVING, "checkpoint_every=2", "keep_last=9", f"run_dir={run}")
    assert code == 0, err
    shutil.copytree(run, again, symlinks=True)
    for checkpoint in (again / "checkpoints").glob("step_*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    (again / "summary.json").unlink()
    code, out, err = sltrain_train(f"run_dir={again}")
    assert code == 0 and f"from step {step}" in out, err
    ours, theirs = (load_file(newest(folder) / "model.safetensors") for folder in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [torch.load(newest(folder) / "optimizer.pt", weights_only=True)["state"] for folder in (again, run)]
    assert all(torch.equal(states[0][name]["exp_avg"], states[1][name]["exp_avg"]) for name in states[1])
    first = load_file(sorted((run / "checkpoints").glob("step_*"))[0] / "model.safetensors")
    assert any(not torch.equal(first[name], theirs[name]) for name in theirs if name.endswith(".indices"))


@pytest.mark.slow
def test_two_ranks_move_as_one_does(tiny: list[str], fork_train: Callable, tmp_path: Path) -> None:
    found = []
    for num_ranks in (1, 2):
        run = tmp_path / str(num_ranks)
        process = fork_train(*tiny, *MOVING, f"run_dir={run}", num_ranks=num_ranks)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(load_file(newest(run) / "model.safetensors"))
    one, two = found
    for name in one:
        if name.endswith(".indices"):
            assert torch.equal(one[name], two[name]), name
        else:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method.regrow_every=-1", "method.regrow_every=-1: must be at least 0"),
        ("method.regrow_every=2 method.regrow_fraction=1", "method.regrow_fraction=1.0: must be above 0 and below 1"),
        ("method.regrow_fraction=0.3", "method.regrow_fraction=0.3 has no effect while S stays"),
        ("method.regrow_every=2 sparsity=0", "moves entries of S, and sparsity=0 leaves none"),
        ("method.regrow_every=7 max_steps=8 warmup_steps=0", "beyond three quarters of the 8 updates"),
        ("method.regrow_every=2 support=block", "those of support=block lie in a pattern; set support=uniform"),
        ("method.regrow_every=2 ema=0.9", "moves entries of S: averages would mix"),
        ("method.regrow_every=2 optimizer=adafactor", "set optimizer=adamw"),
        ("method=low_rank method.regrow_every=2", "regrow_every"),
    ],
)
def test_a_move_that_cannot_be_is_one_line(
    typed: str, said: str, tiny: list[str], sltrain_train: Train, tmp_path: Path
) -> None:
    code, _, err = sltrain_train(*tiny, *typed.split(), f"run_dir={tmp_path}/run")
    assert code == 2 and said in err and len(err.splitlines()) == 1, err
