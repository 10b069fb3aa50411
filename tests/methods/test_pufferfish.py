"""Pufferfish: dense training, one decomposition, and training of the factors and of S, each against another source;
what it takes and says on the way; its refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from resuming import stopped_at
from small_run import Adam, SmallRun, batch, leaf, method_of
from torch import Tensor

from sltrain.building.model import allocate, build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.engine.memory import tensor_peak
from sltrain.layers.kinds.sltrain import SLTrainLinear
from sltrain.optim.named_state import named_state

SETTINGS = {"rank": 3, "alpha": 6.0, "sparsity": 0.1}
Train = Callable[..., tuple[int, str, str]]


def factored(run: SmallRun) -> list[SLTrainLinear]:
    return [layer for layer in run.model.layers if isinstance(layer, SLTrainLinear)]


def nearest(W: Tensor, rank: int, count: int) -> Tensor:
    """The nearest matrix of a rank, and the `count` largest entries of what it leaves, by numpy."""
    U, s, V = np.linalg.svd(W.numpy(), full_matrices=False)
    product = (U[:, :rank] * s[:rank]) @ V[:rank]
    left = W.numpy() - product
    least = np.sort(np.abs(left).ravel())[-count] if count else np.inf
    return torch.from_numpy(product + np.where(np.abs(left) >= least, left, 0))


@pytest.mark.parametrize("sparsity", [0, 0.1])
def test_it_is_dense_training_until_W_is_decomposed(sparsity: float) -> None:
    full = SmallRun(method_of("full"), 20)
    run = SmallRun(method_of("pufferfish", **SETTINGS | {"sparsity": sparsity}, dense_share=0.25), 20)
    for step in range(5):
        assert step == 0 or all(
            torch.equal(a.weight, b.weight) for a, b in zip(run.model.layers, full.model.layers, strict=True)
        )
        full.update()
        run.update()
    for layer, linear in zip(factored(run), full.model.layers, strict=True):
        W = linear.weight.detach()
        wanted = nearest(W, 3, round(sparsity * W.numel()))
        torch.testing.assert_close(layer.dense_weight(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.A @ layer.A.t(), layer.B.t() @ layer.B, rtol=1e-5, atol=1e-6)
    assert not named_state(run.live.optimizer)["state"]


def test_then_A_B_and_S_are_trained_with_moments_of_their_own() -> None:
    """Fifteen updates by Adam on the three of each layer, in float64."""
    run = SmallRun(method_of("pufferfish", **SETTINGS, dense_share=0.25), 20)
    for _ in range(5):
        run.update()
    tensors = {f"{i}{n}": leaf(p) for i, layer in enumerate(factored(run)) for n, p in layer.named_parameters()}
    places = [layer.parts()["S"].dense().ne(0).nonzero(as_tuple=True) for layer in factored(run)]
    adam = Adam()
    for step in range(6, 21):
        run.update()
        W = []
        for i, layer in enumerate(factored(run)):
            S = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
            W.append(2.0 * tensors[f"{i}B"] @ tensors[f"{i}A"] + S.index_put(places[i], tensors[f"{i}values"]))
        x, target = batch(step)
        (torch.tanh(x @ W[0].t()) @ W[1].t() - target).square().mean().backward()
        adam.step(tensors, 0.01)
    for i, layer in enumerate(factored(run)):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter, tensors[f"{i}{name}"], rtol=1e-9, atol=1e-12)


def test_at_full_rank_the_function_stays() -> None:
    method = method_of("pufferfish", rank=9, alpha=9.0, sparsity=0, dense_share=0.5, rank_overrides={"layers.0": 12})
    run, full = SmallRun(method, 8), SmallRun(method_of("full"), 8)
    for _ in range(4):
        run.update()
        full.update()
    for W, linear in zip(run.weights(), full.model.layers, strict=True):
        torch.testing.assert_close(W, linear.weight.detach(), rtol=1e-5, atol=1e-6)


def test_both_parts_have_an_update_whatever_the_share() -> None:
    method = method_of("pufferfish", **SETTINGS, dense_share=0.01)
    assert [phase.after for phase in method.phases(20)] == [1]
    method = method_of("pufferfish", **SETTINGS, dense_share=0.99)
    assert [phase.after for phase in method.phases(20)] == [19]


def test_the_moment_of_factoring_is_planned() -> None:
    """B, A and S of all layers are there at once, and what the decomposition of one takes."""
    options = ["model.hidden_size=128", "model.intermediate_size=352", "rank=48", "method=pufferfish", "seq_len=32"]
    config = compose_config(["model=llama_tiny", "data=stdlib", "device=cpu", *options], TRAIN)
    model = build_model(config, 512, torch.float32)
    allocate(model, torch.device("cpu"))
    model.init_weights(0)
    (phase,) = config.method.phases(8)
    planned = phase.temporary_bytes(model)

    def enter() -> None:
        phase.change(model)
        phase.start(model, torch.Generator().manual_seed(0))

    with torch.no_grad():
        _, taken = tensor_peak(enter, 0, torch.device("cpu"))
    assert taken <= planned <= 1.2 * taken


@pytest.mark.slow
def test_it_says_how_the_factors_are_computed_and_goes_on_without_a_warning(
    tiny: list[str], sltrain_train: Train, tmp_path: Path
) -> None:
    typed = [*tiny, "method=pufferfish", "method.dense_share=0.5", "max_steps=8", "checkpoint_every=6"]
    code, out, err = sltrain_train(*typed, f"run_dir={tmp_path}/run")
    assert code == 0 and "14 of 14 " in out.partition("phase      factors begins after update 4")[2], out + err
    stopped = stopped_at(tmp_path / "run", 6, tmp_path / "stopped")
    code, out, err = sltrain_train(f"run_dir={stopped}")
    assert code == 0 and "14 of 14 " in out and "was started on" not in out, out + err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("rank=0", "method=pufferfish needs rank above 0"),
        ("rank=40", "rank must be between 0 and 32"),
        ("alpha=0", "alpha=0.0: must be a number above 0"),
        ("sparsity=1", "sparsity=1.0: must be at least 0 and below 1"),
        ("sparsity_overrides={q_proj:-1}", "q_proj=-1.0: must be at least 0 and below 1"),
        ("sparsity_overrides={nothing:0.1}", "the pattern 'nothing' fits no replaced layer"),
        ("method.dense_share=0", "method.dense_share=0.0: must be above 0 and below 1"),
        ("method.dense_share=1", "method=full is dense to the end"),
        ("method.gain=0", "method.gain=0.0: must be a number above 0"),
        ("parametrization=spectral", "set method=full, low_rank or sltrain"),
    ],
)
def test_what_cannot_be_is_one_line(typed: str, said: str, tiny: list[str], sltrain_train: Train) -> None:
    code, _, err = sltrain_train(*tiny, "method=pufferfish", *typed.split())
    assert code == 2 and said in err and len(err.splitlines()) == 1, err
