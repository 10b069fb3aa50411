"""Our AdamW is torch's, its state is torch's, and folding is the formula written out in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sltrain.optim import rounding
from sltrain.optim.adamw import AdamW

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_step_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 torch's fused step also computes in float32 and rounds once."""
    ours, theirs = (nn.Parameter(random(7, 5, seed=0, dtype=dtype)) for _ in range(2))
    optimizer, reference = AdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], fused=True, **SETTINGS)
    for step in range(1, 9):
        ours.grad, theirs.grad = (random(7, 5, seed=step, dtype=dtype) for _ in range(2))
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        value, expected = optimizer.state[ours][key], reference.state[theirs][key]
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("ours_first", [True, False])
def test_torchs_adamw_goes_on_where_ours_stopped_and_the_other_way(ours_first: bool) -> None:
    straight, parameter = (nn.Parameter(random(6, seed=0)) for _ in range(2))
    reference = torch.optim.AdamW([straight], foreach=False, **SETTINGS)
    kinds = [AdamW, torch.optim.AdamW] if ours_first else [torch.optim.AdamW, AdamW]
    state = None
    for kind, steps in zip(kinds, [(1, 2, 3), (4, 5, 6)], strict=True):
        optimizer = kind([parameter], **SETTINGS)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            straight.grad, parameter.grad = (random(6, seed=step) for _ in range(2))
            reference.step()
            optimizer.step()
        state = optimizer.state_dict()
    torch.testing.assert_close(parameter, straight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_folding_is_the_formula(num_ranks: int) -> None:
    """Each "rank" starts from its share of the moments; their sum is one process's."""
    num_micro_batches, (beta1, beta2) = 3, SETTINGS["betas"]
    start = random(5, seed=0)
    parameters = [nn.Parameter(start.clone()) for _ in range(num_ranks)]
    optimizers = [AdamW([parameter], **SETTINGS) for parameter in parameters]
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, 6):
        grads = random(num_ranks, num_micro_batches, 5, seed=t)
        for rank, (parameter, optimizer) in enumerate(zip(parameters, optimizers, strict=True)):
            for i in range(num_micro_batches):
                share = 1 / num_ranks if i == 0 else None
                optimizer.fold(optimizer.param_groups[0], parameter, grads[rank, i], share)
        for moments in zip(*(o.moments(p) for o, p in zip(optimizers, parameters, strict=True)), strict=True):
            total = torch.stack(moments).sum(0)
            for moment in moments:
                moment.copy_(total)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            optimizer.apply(optimizer.param_groups[0], parameter)

        m = beta1 * m + (1 - beta1) * grads.sum((0, 1))
        v = beta2 * v + (1 - beta2) * grads.square().sum((0, 1))
        w = w - 1e-2 * 0.1 * w - 1e-2 * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        for parameter in parameters:
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=1e-14)


def test_folding_moves_further_where_micro_batches_agree() -> None:
    """By sqrt(k), as adamw.py says."""
    moved = []
    for num_parts in (1, 9):
        parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = AdamW([parameter], **{**SETTINGS, "weight_decay": 0.0})
        for part in range(num_parts):
            grad = torch.full_like(parameter, 1 / num_parts)
            optimizer.fold(optimizer.param_groups[0], parameter, grad, 1.0 if part == 0 else None)
        optimizer.apply(optimizer.param_groups[0], parameter)
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[1], math.sqrt(9) * moved[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", [None, 5])
def test_pieces_change_nothing(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for piece in (2**22, 16):
        monkeypatch.setattr(rounding, "PIECE", piece)
        parameter = nn.Parameter(random(9, 11, seed=0, dtype=torch.bfloat16))
        optimizer = AdamW([parameter], **SETTINGS, seed=seed)
        for step in range(1, 4):
            parameter.grad = random(9, 11, seed=step, dtype=torch.bfloat16)
            optimizer.step()
        results.append((parameter.detach(), *optimizer.moments(parameter)))
    if seed is not None:  # other random numbers, the same moments
        assert (results[0][0] - results[1][0]).abs().max() < 0.1
        results = [result[1:] for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(0, 6))
    parameter.grad = torch.zeros(0, 6)
    AdamW([parameter], **SETTINGS).step()
    assert parameter.shape == (0, 6)
