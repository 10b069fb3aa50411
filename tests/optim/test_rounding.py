"""Stochastic rounding goes to one of the two neighbours and is right on average; its random numbers need no memory."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import make_optimizer
from torch import Tensor, nn

from sltrain.numeric import stochastic_round
from sltrain.optim.rounding import StochasticRounding, draw_as, generator_of_update

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "device": CPU}
floats = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda value: abs(value) < 3e38)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 numbers around a float32, by torch's own nextafter: (toward zero, away from it)."""
    nearest = torch.tensor(value).bfloat16()
    if abs(nearest.float()) > abs(torch.tensor(value)):
        return torch.nextafter(nearest, torch.zeros_like(nearest)).item(), nearest.item()
    away = torch.nextafter(nearest, torch.full_like(nearest, float("inf") if value > 0 else float("-inf")))
    return nearest.item(), away.item()


@settings(max_examples=200, deadline=None)
@given(floats, st.integers(0, 1000))
def test_result_is_one_of_the_two_neighbours(value: float, seed: int) -> None:
    rounded = stochastic_round(torch.full((64,), value), generator(seed))
    assert rounded.dtype == torch.bfloat16
    assert set(rounded.tolist()) <= set(neighbours(value)), (value, neighbours(value))


@pytest.mark.parametrize("value", [1.0, -3.5, 0.0, float("inf"), float("-inf"), 2.0**-130])
def test_what_bfloat16_can_say_stays(value: float) -> None:
    assert set(stochastic_round(torch.full((500,), value), generator()).tolist()) == {value}


def test_nan_of_any_pattern_stays_nan() -> None:
    patterns = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x3FFFFF], dtype=torch.int32)
    assert bool(stochastic_round(patterns.view(torch.float32), generator()).isnan().all())


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159e-5, -7.7e12, 1.0 + 2**-8])
def test_mean_is_the_value(value: float) -> None:
    """The mean of n results of standard deviation below the gap h lies within 5 h / (2 sqrt(n)) of what is expected."""
    n = 100_000
    down, up = neighbours(value)
    mean = stochastic_round(torch.full((n,), value), generator()).double().mean().item()
    assert abs(mean - torch.tensor(value).double().item()) < 2.5 * abs(up - down) / n**0.5


def test_random_numbers_depend_on_seed_parameter_and_update_alone() -> None:
    def draw(*which: int) -> Tensor:
        return torch.rand(50, generator=generator_of_update(CPU, *which))

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    different = [draw(*which) for which in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1), (12, 3, 3)]]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def build(name: str, parameter: nn.Parameter, lr: float, stochastic_rounding: bool = True) -> torch.optim.Optimizer:
    pytest.importorskip({"adam8bit": "bitsandbytes"}.get(name, "torch"))
    return make_optimizer(
        [("weight", parameter)], name=name, lr=lr, seed=3, stochastic_rounding=stochastic_rounding, **SETTINGS
    )


@pytest.mark.parametrize("name", ["adamw", "adam8bit"])
def test_small_updates_are_not_lost(name: str) -> None:
    """20 updates of 2^-12 each, near 1, where bfloat16 numbers are 2^-7 apart (2^-8 below 1)."""
    moved = {}
    for stochastic_rounding in (False, True):
        parameter = nn.Parameter(torch.ones(64, 128).bfloat16())
        optimizer = build(name, parameter, 2.0**-12, stochastic_rounding)
        for _ in range(20):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[stochastic_rounding] = (1 - parameter.detach().double()).mean().item()
    assert moved[False] == 0.0
    # 8192 numbers, each off by at most a gap of 2^-8
    assert moved[True] == pytest.approx(20 * 2.0**-12, abs=5 * 2.0**-9 / 8192**0.5)


@pytest.mark.parametrize("numel", [100, 5000])
def test_eight_bit_moments_do_not_depend_on_the_weights_dtype(numel: int) -> None:
    plain, rounded, exact = (
        nn.Parameter(torch.randn(numel, generator=generator(1)).bfloat16().to(dtype))
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    optimizers = [
        build("adam8bit", plain, 1e-3, stochastic_rounding=False),
        StochasticRounding(build("adam8bit", rounded, 1e-3, stochastic_rounding=False), seed=1),
        build("adam8bit", exact, 1e-3, stochastic_rounding=False),
    ]
    assert isinstance(optimizers[1], StochasticRounding)
    for step in range(4):
        before = rounded.detach().clone()
        for parameter, optimizer in zip((plain, rounded, exact), optimizers, strict=True):
            parameter.grad = torch.randn(numel, generator=generator(10 + step)).bfloat16().to(parameter.dtype)
            optimizer.step()
        assert not torch.equal(before, rounded)
        assert list(optimizers[1].state) == [rounded], "no state of the float32 copy remains"
        for key, value in optimizers[0].state[plain].items():
            for parameter, optimizer in zip((rounded, exact), optimizers[1:], strict=True):
                other = optimizer.state[parameter][key]
                assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key
        if step == 0:  # the weights are the exact ones' neighbours
            assert bool(((rounded - exact).abs() <= exact.abs() * 2.0**-7).all())


@pytest.mark.parametrize("name", ["adamw", "adam8bit"])
def test_two_ranks_draw_the_same(name: str) -> None:
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        parameter = nn.Parameter(torch.ones(5000).bfloat16())
        optimizer = build(name, parameter, 1e-3)
        parameter.grad = torch.linspace(-1, 1, 5000).bfloat16()
        optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8), slice(8, 10), slice(10, 10)])
def test_rows_are_rounded_as_in_the_whole(rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the process holds, and where pieces end: here every 64 of 170 elements."""
    for module in ("sltrain.numeric", "sltrain.optim.rounding"):
        monkeypatch.setattr(f"{module}.PIECE", 64)

    def make(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "device": CPU}
        return make_optimizer(named.items(), name="adamw", stochastic_rounding=True, seed=5, **settings)

    start = torch.randn(10, 17, generator=generator()).bfloat16()
    whole = {"first": nn.Parameter(torch.ones(3, 3).bfloat16()), "second": nn.Parameter(start.clone())}
    held = nn.Parameter(start[rows].clone())
    of_one, ours = make(whole), make({"second": held})
    draw_as(ours, of_one, {"second": (rows.start * 17, 170)})
    for step in range(3):
        grad = torch.randn(10, 17, generator=generator(step)).bfloat16()
        whole["first"].grad, whole["second"].grad, held.grad = torch.ones(3, 3).bfloat16(), grad, grad[rows].clone()
        of_one.step()
        ours.step()
    assert torch.equal(held, whole["second"][rows])
    assert not torch.equal(whole["second"], start)
