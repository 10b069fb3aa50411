"""An optimizer over pieces of the parameters does what it does over the whole ones, with less memory at work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sltrain.optim import in_pieces
from sltrain.optim.in_pieces import BLOCK, InPieces, piece_sizes
from sltrain.optim.per_layer import PerLayerUpdate

SHAPES = [(40, 64), (7, 100), (5,), (4 * BLOCK,)]
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_pieces, "PIECE", 2 * BLOCK)


def parameters() -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source)) for shape in SHAPES]


def set_gradients(some: list[nn.Parameter], step: int) -> None:
    source = torch.Generator().manual_seed(step)
    for parameter in some:
        # transposed: a gradient need not be contiguous
        shape = parameter.shape[::-1]
        parameter.grad = torch.randn(shape, generator=source).permute(*reversed(range(len(shape))))


def groups_of(some: list[nn.Parameter]) -> list[dict[str, Any]]:
    names = [str(i) for i in range(len(some))]
    return [
        {"params": some[:2], "param_names": names[:2], "weight_decay": 0.1},
        {"params": some[2:], "param_names": names[2:], "weight_decay": 0.0},
    ]


def make_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


def make_adam8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=0.01)


@pytest.mark.parametrize("numel", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3, 11 * BLOCK + 5])
def test_pieces_are_whole_blocks_and_a_rest(numel: int) -> None:
    sizes = piece_sizes(numel)
    assert sum(sizes) == numel and max(sizes) <= max(2 * BLOCK, 1)
    assert all(size % BLOCK == 0 for size in sizes[:-1]) and (sizes[-1] % BLOCK == 0 or sizes[-1] < BLOCK)


@pytest.mark.parametrize("make", [make_adamw, make_adam8bit])
@pytest.mark.parametrize("per_layer", [False, True])
def test_equals_the_optimizer_over_whole_parameters(make: Make, per_layer: bool) -> None:
    """Bit for bit; 8-bit moments too, as no piece here is quantized (fewer than 4,096 elements)."""
    ours, theirs = parameters(), parameters()
    in_pieces_ = InPieces(groups_of(ours), make)
    optimizer: torch.optim.Optimizer = PerLayerUpdate(in_pieces_) if per_layer else in_pieces_
    reference = make(groups_of(theirs))
    for step in range(4):
        for each in (*optimizer.param_groups, *reference.param_groups):
            each["lr"] = 0.01 / (step + 1)  # read in every step
        for some in (ours, theirs):
            set_gradients(some, step)
        if step == 2:
            ours[1].grad = theirs[1].grad = None  # a parameter without a gradient is left alone
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in ours)
    assert not any(piece.grad is not None for group in in_pieces_.inner.param_groups for piece in group["params"])


def test_an_update_is_given_pieces_one_at_a_time() -> None:
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.append([p.numel() for group in self.param_groups for p in group["params"] if p.grad is not None])
            super().step()

    some = parameters()
    optimizer = InPieces(groups_of(some), lambda groups: Spy(groups, lr=0.01))
    set_gradients(some, 0)
    optimizer.step()
    assert [numel for call in seen for numel in call] == [n for p in some for n in piece_sizes(p.numel())]
    assert max(map(len, seen)) == 1
