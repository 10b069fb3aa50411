"""ReLoRA: its updates against a rewrite of the paper's mathematics, what a merge leaves as it is, its phases, pruning
and refusals."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planned import is_as_planned
from resuming import resumes_bit_for_bit
from small_run import Adam, SmallRun, batch, leaf, method_of
from torch import Tensor

import sltrain
from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.layers import ReplacedLinear
from sltrain.layers.kinds.relora import ReLoRALinear
from sltrain.methods.relora import prune_random, prune_smallest
from sltrain.optim.named_state import named_state
from sltrain.planning.accounting import count_parameters, stored_bytes

SETTINGS = {"rank": 3, "alpha": 6.0}
Train = Callable[..., tuple[int, str, str]]


def rewritten(run: SmallRun, first: int, every: int, warmup: int, moments: str, drawn: list[Tensor]) -> list[Tensor]:
    """The dense W of both layers after each of 20 updates, on plain tensors. `drawn` are the A in their order, which
    are random."""
    weights = [leaf(layer.weight) for layer in run.model.layers]  # type: ignore[arg-type]
    factors: list[dict[str, Tensor]] = []
    adam, found = Adam(), []

    def whole() -> list[Tensor]:
        products = [2.0 * own["B"] @ own["A"] for own in factors] or [torch.zeros(())] * 2
        return [weight + product for weight, product in zip(weights, products, strict=True)]

    def started(sides: torch.Size) -> dict[str, Tensor]:
        return {"A": leaf(drawn.pop(0)), "B": leaf(torch.zeros(sides[0], 3, dtype=torch.float64))}

    for step in range(1, 21):
        since = (step - 1 - first) % every
        lr = 0.01 * min(1, (since + 1) / warmup) if step > first else 0.01
        x, target = batch(step)
        W1, W2 = whole()
        (torch.tanh(x @ W1.t()) @ W2.t() - target).square().mean().backward()
        trained = {f"{i}W": weight for i, weight in enumerate(weights)}
        if factors:
            trained = {f"{i}{key}": own[key] for i, own in enumerate(factors) for key in "AB"}
        adam.step(trained, lr)
        if step == first:
            factors = [started(weight.shape) for weight in weights]
        elif step > first and (step - first) % every == 0:
            weights = [W.detach().requires_grad_() for W in whole()]
            factors = [started(weight.shape) for weight in weights]
            if moments == "reset":
                adam.state.clear()
            for name, (count, *both) in adam.state.items():
                if moments == "magnitude":
                    large, lasting = (m.abs() > torch.quantile(m.abs().flatten(), 0.8) for m in both)
                    adam.state[name] = count, both[0] * large * lasting, both[1] * large * lasting
        found += [W.detach() for W in whole()]
    return found


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("moments", ["magnitude", "reset", "keep"])
def test_twenty_updates_are_those_of_the_paper(moments: str, per_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, to 1e-9 relative: a warm start of 5 updates, merges after 10, 15 and 20."""
    drawn: list[Tensor] = []
    start = ReLoRALinear.start_factors
    monkeypatch.setattr(
        ReLoRALinear, "start_factors", lambda self, generator: (start(self, generator), drawn.append(self.A.clone()))
    )
    pruned = {"pruned": 0.8} if moments == "magnitude" else {}
    method = method_of("relora", **SETTINGS, warm_start=0.25, merge_every=5, merge_warmup=3, moments=moments, **pruned)
    run, fresh = (SmallRun(method, max_steps=20, per_layer=per_layer) for _ in range(2))
    found = []
    for _ in range(20):
        run.update()
        found += [
            layer.dense_weight() if isinstance(layer, ReplacedLinear) else layer.weight.detach().clone()  # type: ignore[operator, union-attr]
            for layer in run.model.layers
        ]
    assert len(drawn) == 8
    for weight, wanted in zip(found, rewritten(fresh, 5, 5, 3, moments, drawn), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-9, atol=1e-12)


def test_a_merge_changes_the_factors_and_not_the_function() -> None:
    torch.manual_seed(0)
    layer = ReLoRALinear(70, 50, 8, alpha=16, bias=True)
    with torch.no_grad():
        layer.B.normal_()
    x, before = torch.randn(6, 70), layer.dense_weight()
    y = layer(x)
    layer.merge(torch.Generator().manual_seed(1))
    assert (layer.dense_weight() - before).norm() <= 1e-6 * before.norm()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    assert not layer.B.any() and layer.A.abs().max() <= 1 / math.sqrt(70) and layer.A.std() > 0.5 / math.sqrt(70)


def test_forward_is_the_dense_weight_and_W0_gets_no_gradient() -> None:
    layer = ReLoRALinear(24, 16, 4, alpha=8, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.dense_weight(), layer.bias))
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"A", "B", "bias"}
    assert layer.num_trained == 4 * (24 + 16) and layer.multiply_adds() == 24 * 16 + 4 * (24 + 16)


def test_under_autocast_gradients_are_those_of_the_parts() -> None:
    layer = ReLoRALinear(24, 16, 4, alpha=8)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(8, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(layer.A.grad, layer.scale * layer.B.sum(0)[:, None] * x.sum(0), rtol=0.1, atol=0.5)
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(8, 24), rtol=0.1, atol=0.1)


def test_it_starts_from_a_dense_matrix_as_that_matrix() -> None:
    weight = torch.randn(30, 40)
    layer = ReLoRALinear.from_dense(weight, torch.Generator().manual_seed(0), rank=4, alpha=8)
    assert torch.equal(layer.dense_weight(), weight) and layer.A.any()


@pytest.mark.parametrize("merge_every", [0, 12])
def test_the_warm_start_is_dense_training_and_without_a_merge_it_is_lora(merge_every: int) -> None:
    full = SmallRun(method_of("full"), 20)
    run = SmallRun(method_of("relora", **SETTINGS, warm_start=0.5, merge_every=merge_every, merge_warmup=2), 20)
    other = SmallRun(method_of("relora", **SETTINGS, warm_start=0.5, merge_every=11, merge_warmup=2), 20)
    for _ in range(10):
        for each in (full, run, other):
            each.update()
        weights = [getattr(layer, "W0", getattr(layer, "weight", None)) for layer in run.model.layers]
        assert all(torch.equal(a, b.weight) for a, b in zip(weights, full.model.layers, strict=True))  # type: ignore[arg-type]
    frozen = [layer.W0.clone() for layer in run.model.layers]  # type: ignore[union-attr, operator]
    for _ in range(10):
        run.update()
        other.update()
    assert all(torch.equal(layer.W0, before) for layer, before in zip(run.model.layers, frozen, strict=True))  # type: ignore[arg-type]
    assert all(map(torch.equal, run.weights(), other.weights()))


def test_a_phase_frees_the_moments_of_what_it_freezes() -> None:
    run = SmallRun(method_of("relora", **SETTINGS, warm_start=0.5, merge_every=3, merge_warmup=0, moments="reset"), 8)
    names = []
    for _ in range(7):
        run.update()
        names.append(sorted(named_state(run.live.optimizer)["state"]))
    assert names[2] == ["layers.0.weight", "layers.1.weight"] and names[3] == []
    assert names[4] == [f"layers.{i}.{factor}" for i in (0, 1) for factor in "AB"] and names[6] == []


def test_pruning_keeps_what_is_large_in_both_moments_or_a_share_at_random() -> None:
    torch.manual_seed(0)
    first = torch.randn(1000)
    second = first.square()
    alone, both, some = first.clone(), [first.clone(), second.clone()], [first.clone(), second.clone()]
    prune_smallest([alone], 0.99)
    kept = first.abs().topk(10).indices
    assert sorted(alone.nonzero().flatten().tolist()) == sorted(kept.tolist())
    assert torch.equal(alone[kept], first[kept])
    both[1][kept[:4]] = 1e-9
    prune_smallest(both, 0.99)
    assert all(sorted(moment.nonzero().flatten().tolist()) == sorted(kept[4:].tolist()) for moment in both)
    prune_random(some, 0.9, torch.Generator().manual_seed(0))
    assert 60 <= some[0].count_nonzero() <= 140 and torch.equal(some[0] != 0, some[1] != 0)
    assert torch.equal(some[0][some[0] != 0], first[some[0] != 0])


def test_no_moment_is_left_without_its_root() -> None:
    """Or the next update of A, which has no gradient then, would be a division by eps."""
    method = method_of("relora", **SETTINGS, warm_start=0, merge_every=10, merge_warmup=0, pruned=0.8)
    run = SmallRun(method, 20)
    for _ in range(11):
        before = run.model.layers[0].A.detach().clone()  # type: ignore[union-attr, operator]
        run.update()
    assert (run.model.layers[0].A - before).abs().max() < 3 * run.lr  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("rank=0", "method=relora needs rank above 0"),
        ("rank_overrides={q_proj:0}", "q_proj is 0"),
        ("rank=40", "rank must be between 0 and 32"),
        ("alpha=0", "alpha"),
        ("method.warm_start=1", "method.warm_start=1.0: must be at least 0 and below 1"),
        ("method.merge_every=-5", "method.merge_every=-5: must be at least 0"),
        ("method.merge_every=10", "method.merge_warmup=50 is not over before the next merge"),
        ("method.moments=halve", "method.moments=halve: choose one of magnitude, random, reset, keep"),
        ("method.pruned=1", "method.pruned=1.0: must be above 0 and below 1"),
        ("method.moments=reset method.pruned=0.5", "is not read by method.moments=reset"),
        ("method.frozen_dtype=fp8", "method.frozen_dtype=fp8: choose one of auto, float32, bfloat16"),
        ("method.frozen_rounding=up", "method.frozen_rounding=up: choose one of nearest, stochastic"),
        ("method.frozen_dtype=float32 method.frozen_rounding=stochastic", "drop one"),
        ("method.frozen_rounding=stochastic", "for a W0 in bfloat16, and it is float32; set frozen_dtype=bfloat16"),
        ("ema=0.9", "ema=0.9 averages each tensor by itself, and method=relora"),
        ("method.sparsity=0.1", "sparsity"),
    ],
)
def test_what_cannot_be_is_one_line(typed: str, said: str, tiny: list[str], sltrain_train: Train) -> None:
    code, _, err = sltrain_train(*tiny, "method=relora", *typed.split())
    assert code == 2 and said in err and len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_it_begins_with_the_weights_of_a_dense_run_and_says_where_moments_are_quantized(
    tiny: list[str], sltrain_train: Train, metrics_of: Callable, tmp_path: Path
) -> None:
    """Without a warm start the first loss is the dense model's, and the first rate is the schedule's."""
    pytest.importorskip("bitsandbytes")
    code, _, err = sltrain_train(*tiny, "method=full", f"run_dir={tmp_path}/dense")
    assert code == 0, err
    typed = ["method=relora", "rank=8", "method.warm_start=0", "method.merge_every=4", "method.merge_warmup=2"]
    big = ["model.intermediate_size=512", "optimizer=adam8bit"]  # factors of 8 x 512 elements are quantized
    code, out, err = sltrain_train(
        *tiny, *typed, f"init_from={tmp_path}/dense", "warmup_steps=0", "schedule=constant", f"run_dir={tmp_path}/more"
    )
    assert code == 0 and "relative error: median 0.0000" in out, out + err
    lines = [line for line in metrics_of(tmp_path / "more") if line["event"] == "train"]
    last = [line for line in metrics_of(tmp_path / "dense") if line["event"] == "train"][-1]
    assert lines[0]["loss"] < last["loss"] + 0.3 and lines[0]["lr"] == 2 * lines[4]["lr"] == lines[5]["lr"]
    code, out, err = sltrain_train(*tiny, *typed, *big, f"run_dir={tmp_path}/quantized")
    assert code == 0 and out.count("of another form than moments") == 1, out + err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "per_layer_update=true global_batch_size=4"])
def test_memory_with_factors_is_as_planned(
    how: str, tiny: list[str], sltrain_train: Train, metrics_of: Callable, tmp_path: Path
) -> None:
    """The phase that the case of every method, whose peak is in its warm start, does not measure."""
    sizes = ["model.hidden_size=128", "model.intermediate_size=352", "rank=16", "seq_len=128"]
    typed = ["method=relora", "method.warm_start=0", "method.merge_every=2", "method.merge_warmup=0", *how.split()]
    code, _, err = sltrain_train(*tiny, *sizes, *typed, f"run_dir={tmp_path}/run")
    assert code == 0, err
    lines = [line for line in metrics_of(tmp_path / "run") if "peak_tensor_bytes" in line]
    measured = max(line["peak_tensor_bytes"] for line in lines)
    assert measured == pytest.approx(lines[-1]["planned_memory_bytes"], rel=0.05)


FROZEN = ["method=relora", "method.warm_start=0.5", "method.merge_every=2", "method.merge_warmup=2", "max_steps=8"]


@pytest.mark.slow
@pytest.mark.parametrize(("rounding", "at"), [("nearest", [4]), ("stochastic", [3, 6])])
def test_a_run_with_a_bfloat16_W0_resumes_exports_and_loads(
    rounding: str, at: list[int], tiny: list[str], sltrain_train: Train, tmp_path: Path
) -> None:
    """Stopped at the end of the warm start, before it, and after a merge; W0 keeps its dtype in every file."""
    own = ["method.frozen_dtype=bfloat16", f"method.frozen_rounding={rounding}"]
    run, name = resumes_bit_for_bit([*tiny, *FROZEN, *own], sltrain_train, tmp_path, at), "model.layers.1.mlp.up_proj"
    ids = torch.arange(20)[None]
    trained = sltrain.load(run)
    assert trained.get_submodule(name).W0.dtype == torch.bfloat16 != trained.get_submodule(name).A.dtype
    with torch.no_grad():
        wanted = trained(ids)
    for format in ("compressed", "dense"):
        sltrain.export(run, tmp_path / format, format=format)
        with torch.no_grad():
            torch.testing.assert_close(sltrain.load(tmp_path / format)(ids), wanted, rtol=1e-5, atol=1e-5)
    assert sltrain.load(tmp_path / "compressed").get_submodule(name).W0.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed",
    [
        ["method=relora", "method.warm_start=0", "method.frozen_dtype=bfloat16"],
        ["method=switchlora", "method.frozen_dtype=bfloat16", "method.frozen_rounding=stochastic", "method.freeze=2"],
        ["method=gradnorm_lorp", "method.frozen_dtype=bfloat16"],
    ],
)
def test_memory_with_a_W0_of_another_dtype_is_as_planned(
    typed: list[str], tiny: list[str], sltrain_train: Train, metrics_of: Callable, tmp_path: Path
) -> None:
    is_as_planned([*tiny, *typed], sltrain_train, metrics_of, tmp_path / "run")


def test_a_bfloat16_W0_is_half_of_a_float32_one(tiny: list[str]) -> None:
    counts = []
    for dtype in ("auto", "float32", "bfloat16"):
        typed = [*tiny, "method=relora", "method.warm_start=0", f"method.frozen_dtype={dtype}"]
        model = build_model(compose_config(typed, TRAIN), 512, torch.float32)
        counts.append((stored_bytes(model)["frozen_weights"], count_parameters(model)["frozen"]))
    assert counts[0] == counts[1] == (2 * counts[2][0], counts[2][1])
