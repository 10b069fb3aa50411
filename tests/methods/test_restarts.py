"""Restarts: their formula against a rewrite with a full decomposition, what they leave as it is, and refusals."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Adam, SmallRun, batch, leaf, method_of
from torch import Tensor

from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.methods.restarts import climb
from sltrain.optim.named_state import named_state

OPTIONS = {
    "sltrain": {"rank": 4, "alpha": 8.0, "sparsity": 0.1, "support": "uniform"},
    "low_rank": {"rank": 4, "alpha": 8.0},
}


def rewritten(run: SmallRun, steps: int, every: int, warmup: int, balance: bool, reset: bool) -> list[list[Tensor]]:
    """The dense W after each update, by the paper's algorithm on plain tensors: the whole B A is decomposed."""
    layers: list[dict[str, Tensor]] = []
    for layer in run.model.layers:
        sparse = layer.dense_weight() - layer.scale * layer.B @ layer.A  # type: ignore[operator, union-attr]
        own = {"A": leaf(layer.A), "B": leaf(layer.B)}  # type: ignore[arg-type]
        if hasattr(layer, "values"):
            own |= {"S": leaf(sparse), "mask": (sparse != 0).double()}
        layers.append(own)
    adam, found = Adam(), []

    def weight(own: dict[str, Tensor]) -> Tensor:
        return 2.0 * own["B"] @ own["A"] + (own["S"] * own["mask"] if "S" in own else 0)

    for step in range(1, steps + 1):
        lr, since = 0.01, (step - 1) % every
        if step > every and since < warmup > 1:
            lr = 0.001 * lr + (lr - 0.001 * lr) * since / (warmup - 1)
        x, target = batch(step)
        (torch.tanh(x @ weight(layers[0]).t()) @ weight(layers[1]).t() - target).square().mean().backward()
        trained = {f"{i}{key}": own[key] for i, own in enumerate(layers) for key in own if key != "mask"}
        adam.step(trained, lr)
        if step % every == 0:
            if balance:
                for own in layers:
                    left, values, right = torch.linalg.svd(own["B"].detach() @ own["A"].detach())
                    own["B"] = leaf(left[:, :4] @ values[:4].sqrt().diag())
                    own["A"] = leaf(values[:4].sqrt().diag() @ right[:4])
            if reset:
                adam.state.clear()
        found.append([weight(own).detach() for own in layers])
    return found


@pytest.mark.parametrize(("balance", "reset", "warmup"), [(True, True, 3), (True, False, 4), (False, True, 1)])
@pytest.mark.parametrize("name", OPTIONS)
def test_twenty_updates_are_those_of_the_paper(name: str, balance: bool, reset: bool, warmup: int) -> None:
    """In float64, to 1e-9 relative. Without a reset moments belong to factors with signs of their own, which no two
    decompositions share: then the updates up to the first restart are compared."""
    options = {"restart_balance": balance, "restart_reset": reset, "restart_warmup": warmup}
    run = SmallRun(method_of(name, **OPTIONS[name], restart_every=6, **options), max_steps=20)
    expected = rewritten(run, 20 if reset else 6, 6, warmup, balance, reset)
    for wanted in expected:
        run.update()
        for weight, other in zip(run.weights(), wanted, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [LowRankLinear, SLTrainLinear])
def test_balancing_changes_factors_and_not_the_function(kind: type) -> None:
    """To 1e-6 in float32; afterwards both Gram matrices are the singular values."""
    torch.manual_seed(0)
    shape = (70, 50, 8, 0.1, 16.0) if kind is SLTrainLinear else (70, 50, 8, 16.0)
    layer = kind(*shape)
    with torch.no_grad():
        layer.B.normal_(0, 3.0)
        layer.A.normal_(0, 0.01)
    before = layer.dense_weight()
    layer.balance()
    after = layer.dense_weight()
    assert (after - before).norm() <= 1e-6 * before.norm()
    values = torch.linalg.svdvals(layer.B @ layer.A)[:8].diag()
    for gram in (layer.B.t() @ layer.B, layer.A @ layer.A.t()):
        torch.testing.assert_close(gram, values, rtol=1e-4, atol=1e-4 * values.max().item())


def test_a_product_of_zero_keeps_the_factor_that_it_learns_from() -> None:
    layer = SLTrainLinear(20, 10, 4, 0.1, 8.0)
    A = layer.A.detach().clone()
    layer.balance()
    assert torch.equal(layer.A, A) and not layer.B.any()
    SLTrainLinear(20, 10, 0, 0.1, 8.0).balance()  # nothing to do


@pytest.mark.parametrize(("optimizer", "per_layer"), [("adamw", False), ("adamw", True), ("adam8bit", False)])
def test_a_reset_leaves_no_state(optimizer: str, per_layer: bool) -> None:
    if optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes")
    method = method_of("sltrain", **OPTIONS["sltrain"], restart_every=3, restart_warmup=2)
    run = SmallRun(method, 6, optimizer=optimizer, per_layer=per_layer, dtype=torch.float32)
    for _ in range(2):
        run.update()
    assert len(named_state(run.live.optimizer)["state"]) == 6
    run.update()
    assert named_state(run.live.optimizer)["state"] == {}


def test_the_rate_climbs_from_a_thousandth_to_the_schedule() -> None:
    method = method_of("sltrain", **OPTIONS["sltrain"], restart_every=100)
    factors = [method.lr_factor(step, 300) for step in range(1, 301)]
    assert factors[:100] == [1.0] * 100 and factors[110:200] == [1.0] * 90
    assert factors[100:110] == pytest.approx([0.001 + 0.999 * i / 9 for i in range(10)])
    assert factors[200:] == factors[100:200]
    assert [climb(number, warmup, 0.5) for warmup in (0, 1) for number in (0, 1)] == [1.0] * 4


@pytest.mark.parametrize("name", OPTIONS)
def test_without_restarts_nothing_is_due(name: str) -> None:
    run = SmallRun(method_of(name, **OPTIONS[name]), 10)
    assert run.schedule.actions == [] and run.method.lr_factor(10, 10) == 1.0
    long = SmallRun(method_of(name, **OPTIONS[name], restart_every=11), 10)
    for _ in range(10):
        run.update()
        long.update()
    assert all(map(torch.equal, run.weights(), long.weights()))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method.restart_every=-1", "method.restart_every=-1: must be at least 0"),
        ("method.restart_every=20 method.restart_warmup=-1", "method.restart_warmup=-1: must be at least 0"),
        ("method.restart_every=10", "restart_warmup=10 is not over before the next restart"),
        ("method.restart_balance=false", "method.restart_balance=false has no effect without restarts"),
        ("method.restart_warmup=5", "method.restart_warmup=5 has no effect without restarts"),
        (
            "method.restart_every=9 method.restart_balance=false method.restart_reset=false method.restart_warmup=1",
            "method.restart_every=9 restarts nothing",
        ),
        ("method.restart_every=often", "restart_every"),
        ("method=full method.restart_every=9", "restart_every"),
    ],
)
def test_a_restart_that_cannot_be_is_one_line(
    typed: str, said: str, tiny: list[str], sltrain_train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = sltrain_train(*tiny, *typed.split(), f"run_dir={tmp_path}/run")
    assert code == 2 and said in err and len(err.splitlines()) == 1, err


def test_the_log_shows_the_learning_rate_that_was_used(
    tiny: list[str], sltrain_train: Callable[..., tuple[int, str, str]], metrics_of: Callable, tmp_path: Path
) -> None:
    """A restart inside the schedule's warmup: both factors multiply."""
    typed = ["method.restart_every=3", "method.restart_warmup=2", "warmup_steps=6", "schedule=constant", "max_steps=8"]
    code, _, err = sltrain_train(*tiny, "lr=0.006", *typed, f"run_dir={tmp_path}/run")
    assert code == 0, err
    rates = [line["lr"] for line in metrics_of(tmp_path / "run") if line["event"] == "train"]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.000004, 0.005, 0.006, 0.000006, 0.006])
    assert all(math.isfinite(line["loss"]) for line in metrics_of(tmp_path / "run") if line["event"] == "train")
