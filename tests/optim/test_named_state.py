"""State by name survives a change of the model: what stays continues bit for bit, what is new starts without state."""

import io
from typing import Any

import pytest
import torch
from optimizers import make_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.optim import in_pieces
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.named_state import (
    change_moments,
    load_named_state,
    named_parameters,
    named_state,
    rebuild_optimizer,
    reset_state,
)
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.optim.wrapper import innermost

HOWS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "adamw rounded": {"name": "adamw", "stochastic_rounding": True},
    "adam8bit": {"name": "adam8bit"},
    "adam8bit in pieces": {"name": "adam8bit", "stochastic_rounding": True},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a parameter has several."""
    monkeypatch.setattr(in_pieces, "PIECE", 16 * in_pieces.BLOCK)


class Net(nn.Module):
    """Large enough for quantized moments and several pieces; `norm` is of the group that does not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(100, 90, bias=False), nn.LayerNorm(90)
        self.b = nn.Linear(90, 70)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.bfloat16()

    def change(self) -> None:
        """What a phase might do: `b` is frozen, adapters join, in front of it in the model's order and after it."""
        self.norm.more = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.b.requires_grad_(False)
        self.late = nn.Linear(90, 70, bias=False, dtype=torch.bfloat16)
        nn.init.zeros_(self.late.weight)


def build(model: nn.Module, how: str, per_layer: bool = False) -> Optimizer:
    settings = HOWS[how]
    if (package := OPTIMIZERS.load(settings["name"]).package) is not None:
        pytest.importorskip(package)
    inner = make_optimizer(
        model.named_parameters(),
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.1,
        device=torch.device("cpu"),
        seed=3,
        **settings,
    )
    return PerLayerUpdate(inner) if per_layer else inner


def gradient(name: str, parameter: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name) + parameter.numel())
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def update(model: nn.Module, optimizer: Optimizer, *steps: int) -> None:
    """Updates by gradients that depend on the parameter and the step alone."""
    for step in steps:
        optimizer.zero_grad()
        if isinstance(optimizer, PerLayerUpdate):
            optimizer.before_backward(is_last=True)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sum((p * gradient(name, p, step)).sum() for name, p in trained.items()).backward()  # type: ignore[union-attr]
        assert all((p.grad is None) == isinstance(optimizer, PerLayerUpdate) for p in trained.values())
        optimizer.step()


def bits(optimizer: Optimizer) -> dict[tuple[str, str], Tensor]:
    """Every value of the state, copied, by parameter and key."""
    return {
        (name, key): torch.as_tensor(value).clone()
        for leaf in innermost(optimizer)
        for name, parameter in named_parameters(leaf).items()
        for key, value in leaf.state.get(parameter, {}).items()
    }


def assert_equal(left: dict[Any, Tensor], right: dict[Any, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_a_rebuilt_optimizer_continues_bit_for_bit(how: str, per_layer: bool) -> None:
    """Nothing changed in the model: as if the first optimizer had continued."""
    model, straight = Net(), Net()
    reference = build(straight, how, per_layer)
    update(straight, reference, 1, 2, 3, 4)
    old = build(model, how, per_layer)
    update(model, old, 1, 2)
    before = bits(old)
    new = rebuild_optimizer(old, lambda: build(model, how, per_layer))
    assert_equal(bits(new), before)
    assert not bits(old), "no tensor is held by both"
    update(model, new, 3, 4)
    assert_equal(dict(model.named_parameters()), dict(straight.named_parameters()))
    assert_equal(bits(new), bits(reference))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_a_changed_model_continues_as_one_built_that_way(how: str, per_layer: bool) -> None:
    """The second source: a model that had its last structure from the start, whose parameters saw no gradient before
    they joined or after they were frozen. Stochastic rounding draws by a parameter's number, which differs there:
    with it, a run that begins with the changed model and the saved state."""
    model = Net()
    old = build(model, how, per_layer)
    update(model, old, 1, 2)
    kept = {key: value for key, value in bits(old).items() if not key[0].startswith("b.")}
    model.change()
    new = rebuild_optimizer(old, lambda: build(model, how, per_layer))
    assert_equal(bits(new), kept)
    if HOWS[how].get("stochastic_rounding"):
        resumed = Net()
        resumed.change()
        resumed.load_state_dict(model.state_dict())
        saved = io.BytesIO()
        torch.save(named_state(new), saved)
        saved.seek(0)
        reference = build(resumed, how, per_layer)
        load_named_state(reference, torch.load(saved, weights_only=True))
        for each, optimizer in ((model, new), (resumed, reference)):
            update(each, optimizer, 3, 4)
        assert_equal(dict(model.named_parameters()), dict(resumed.named_parameters()))
        assert_equal(bits(new), bits(reference))
        return

    straight = Net()
    straight.change()
    straight.b.requires_grad_(True)
    reference = build(straight, how, per_layer)
    joined = [straight.norm.more, straight.late.weight]
    for parameter in joined:
        parameter.requires_grad_(False)
    update(straight, reference, 1, 2)
    for parameter in joined:
        parameter.requires_grad_(True)
    straight.b.requires_grad_(False)
    for each, optimizer in ((model, new), (straight, reference)):
        update(each, optimizer, 3, 4)
    assert_equal(dict(model.named_parameters()), dict(straight.named_parameters()))
    frozen = {key: value for key, value in bits(reference).items() if key[0].startswith("b.")}
    assert frozen
    assert_equal({**bits(new), **frozen}, bits(reference))


def test_names_are_those_of_pieces_and_of_the_first_of_tied_parameters() -> None:
    model = Net()
    model.late = nn.Linear(100, 90, bias=False)
    model.late.weight = model.a.weight
    assert list(named_state(build(model, "adamw"))["groups"][0]["names"]) == ["a.weight", "b.weight"]
    inner = named_state(build(model, "adam8bit in pieces", per_layer=True))
    sizes = in_pieces.piece_sizes(model.a.weight.numel())
    assert inner["groups"][0]["names"][: len(sizes)] == [f"a.weight#{i}" for i in range(len(sizes))]
    assert len(sizes) == 4 and inner["class"] == "AdamW8bit"


def test_hooks_of_the_old_optimizer_are_gone() -> None:
    """Otherwise both would update a parameter."""
    model = Net()
    old = build(model, "adamw", per_layer=True)
    update(model, old, 1)
    rebuild_optimizer(old, lambda: build(model, "adamw", per_layer=True))
    counts = [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]  # type: ignore[attr-defined]
    assert counts == [1] * len(counts)


def test_a_parameter_of_another_shape_is_a_new_one() -> None:
    model = Net()
    old = build(model, "adam8bit in pieces")
    update(model, old, 1)
    model.a = nn.Linear(101, 90, bias=False, dtype=torch.bfloat16)  # its first piece has the same size
    new = rebuild_optimizer(old, lambda: build(model, "adam8bit in pieces"))
    assert {key[0].partition("#")[0] for key in bits(new)} == {"norm.weight", "norm.bias", "b.weight", "b.bias"}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_reset_parameters_continue_as_in_a_new_optimizer(how: str, per_layer: bool) -> None:
    """The others, as if nothing had happened."""
    model, untouched = Net(), Net()
    optimizer, reference = build(model, how, per_layer), build(untouched, how, per_layer)
    for each, its_optimizer in ((model, optimizer), (untouched, reference)):
        update(each, its_optimizer, 1, 2)
    reset_state(optimizer, ["a.weight", "norm.bias"])
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    first = build(fresh, how, per_layer)
    for each, its_optimizer in ((model, optimizer), (untouched, reference), (fresh, first)):
        update(each, its_optimizer, 3)
    for (name, parameter), other, new in zip(
        model.named_parameters(), untouched.parameters(), fresh.parameters(), strict=True
    ):
        was_reset = name in ("a.weight", "norm.bias")
        assert torch.equal(parameter, new if was_reset else other), name
        assert not torch.equal(new, other), "the two sources differ"
    with pytest.raises(ValueError, match="no parameter nothing"):
        reset_state(optimizer, ["a.weight", "nothing"])


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_moments_change_in_place_or_begin_again_where_they_are_quantized(how: str, per_layer: bool) -> None:
    """Those of other parameters, and the number of updates, stay."""
    model = Net()
    optimizer = build(model, how, per_layer)

    def double(name: str, moments: list[Tensor]) -> None:
        assert len(moments) in (0, 2) and name == "a.weight"
        for moment in moments:
            moment.mul_(2)

    assert change_moments(optimizer, ["a.weight"], double) == []  # there are none yet
    update(model, optimizer, 1, 2)
    before = bits(optimizer)
    dropped = change_moments(optimizer, ["a.weight"], double)
    after = bits(optimizer)
    assert dropped == ([] if how.startswith("adamw") else ["a.weight"])
    doubled = {
        key: value * (2 if key[0] == "a.weight" and key[1] != "step" else 1)
        for key, value in before.items()
        if key[0].partition("#")[0] not in dropped
    }
    assert_equal(after, doubled)
    update(model, optimizer, 3)
    with pytest.raises(ValueError, match="no parameter nothing"):
        change_moments(optimizer, ["a.weight", "nothing"], double)


def test_only_on_request_does_a_parameter_start_without_state() -> None:
    model, other = Net(), Net()
    optimizer = build(model, "adamw")
    update(model, optimizer, 1)
    saved = named_state(optimizer)
    other.change()
    changed = build(other, "adamw")
    with pytest.raises(ValueError, match=r"parameter b.bias: the file has it, this run does not \(3 more"):
        load_named_state(changed, saved)
    assert not bits(changed)
    load_named_state(changed, saved, strict=False)
    assert {key[0] for key in bits(changed)} == {"a.weight", "norm.weight", "norm.bias"}


def test_an_optimizer_without_names_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="AdamW does not know its parameters' names"):
        named_state(torch.optim.AdamW(Net().parameters()))
