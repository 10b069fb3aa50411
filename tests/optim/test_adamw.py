"""Our AdamW is torch's, and its state is torch's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sltrain import numeric
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
def test_torchs_adamw_continues_ours_and_the_other_way(ours_first: bool) -> None:
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


@pytest.mark.parametrize("seed", [None, 5])
def test_pieces_change_nothing(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for piece in (2**22, 16):
        monkeypatch.setattr(numeric, "PIECE", piece)
        parameter = nn.Parameter(random(9, 11, seed=0, dtype=torch.bfloat16))
        optimizer = AdamW([parameter], **SETTINGS, seed=seed)
        for step in range(1, 4):
            parameter.grad = random(9, 11, seed=step, dtype=torch.bfloat16)
            optimizer.step()
        state = optimizer.state[parameter]
        results.append((parameter.detach(), state["exp_avg"], state["exp_avg_sq"]))
    if seed is not None:  # other random numbers, the same moments
        assert (results[0][0] - results[1][0]).abs().max() < 0.1
        results = [result[1:] for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(0, 6))
    parameter.grad = torch.zeros(0, 6)
    AdamW([parameter], **SETTINGS).step()
    assert parameter.shape == (0, 6)
