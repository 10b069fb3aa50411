"""Updates inside backward: each gradient is used once and freed; groups and state are the inner optimizer's."""

from typing import Any

import pytest
import torch
from optimizers import make_optimizer
from torch import Tensor, nn

from sltrain.optim.build import set_learning_rate
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.optim.wrapper import only

SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "device": torch.device("cpu")
}  # fmt: skip


class Net(nn.Module):
    """Three layers of different shapes, one of them used twice, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Linear(6, 80, bias=False)
        self.twice = nn.Linear(80, 80)
        self.norm = nn.LayerNorm(80)
        self.down = nn.Linear(80, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.up(x))))
        return self.down(self.norm(self.twice(x)))


def build(model: nn.Module, name: str = "adamw", **how: Any) -> torch.optim.Optimizer:
    if (package := OPTIMIZERS.load(name).package) is not None:
        pytest.importorskip(package)
    return make_optimizer(model.named_parameters(), name=name, **{**SETTINGS, **how})


def loss_of(model: nn.Module, seed: int) -> Tensor:
    return model(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum()


def assert_same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """Parameters and states, bit for bit."""
    for a, b in zip(*(group_parameters(each) for each in (left, right)), strict=True):
        assert torch.equal(a, b)
        assert left.state[a].keys() == right.state[b].keys()
        for key, value in left.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right.state[b][key])), key


def group_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("name", ["adamw", "adam8bit"])
@pytest.mark.parametrize("is_announced", [True, False])
def test_equals_the_inner_optimizer_alone(name: str, is_announced: bool) -> None:
    """Announced, the update is made in backward and `step` finds nothing; otherwise `step` makes it."""
    model, reference = Net(), Net()
    optimizer, ordinary = PerLayerUpdate(build(model, name)), build(reference, name)
    for step in range(1, 5):
        for each in (optimizer, ordinary):
            set_learning_rate(each, 1e-2 / step)
            each.zero_grad()
        if is_announced:
            optimizer.before_backward(is_last=True)
        loss_of(model, step).backward()
        assert all((parameter.grad is None) == is_announced for parameter in model.parameters())
        optimizer.step()
        assert all(parameter.grad is None for parameter in model.parameters())
        loss_of(reference, step).backward()
        ordinary.step()
        assert_same(optimizer, ordinary)


def test_one_gradient_is_held_at_a_time() -> None:
    model = Net()
    optimizer = PerLayerUpdate(build(model))
    held: list[int] = []
    optimizer.inner.register_step_pre_hook(
        lambda *_: held.append(sum(parameter.grad is not None for parameter in model.parameters()))
    )
    optimizer.before_backward(is_last=True)
    loss_of(model, 1).backward()
    # A module's weight and bias come out of one node of the graph together.
    assert len(held) == len(list(model.parameters())) and max(held) <= 2


def test_ranks_learn_in_which_order_gradients_come() -> None:
    """The parameters are given in the order in which their gradients come, so in the first update all wait for the last
    one; in later ones none does."""
    model = Net()
    events: list[str] = []
    optimizer = PerLayerUpdate(
        build(model),
        parameters=list(model.parameters())[::-1],
        reduce_grad=lambda tensor: events.append("sent"),
    )
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("came"))  # after the optimizer's
    for step in (1, 2, 3):
        events.clear()
        optimizer.before_backward(is_last=True)
        loss_of(model, step).backward()
        if step == 1:
            assert events == ["came"] * 6 + ["sent"] * 7 + ["came"]
        else:
            assert events == ["sent", "came"] * 7
        assert optimizer.finish()[1:] == (7, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_skips_its_own_tensor(bad: float) -> None:
    model, reference = Net(), Net()
    optimizer = PerLayerUpdate(build(model))
    ordinary = PerLayerUpdate(build(reference))
    for step in (1, 2):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        handle = model.norm.weight.register_hook(lambda grad, step=step: grad * bad if step == 2 else grad)
        for each, net in ((optimizer, model), (ordinary, reference)):
            each.before_backward(is_last=True)
            loss_of(net, step).backward()
        handle.remove()
        squared, num_updated, num_skipped = optimizer.finish()
        good_squared = ordinary.finish()[0]
        assert (num_updated, num_skipped) == ((7, 0) if step == 1 else (6, 1))
        assert 0 < squared <= good_squared and (squared < good_squared) == (step == 2)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, before[name] if name == "norm.weight" else expected), name
        assert int(optimizer.state[parameter]["step"]) == (1 if name == "norm.weight" else 2)


def test_norm_is_that_of_all_gradients_and_clipping_is_by_parameter() -> None:
    model, reference = Net(), Net()
    optimizer, ordinary = PerLayerUpdate(build(model), grad_clip_per_parameter=9.0), build(reference)
    for step in range(1, 4):
        optimizer.before_backward(is_last=True)
        loss_of(model, step).backward()
        squared, num_updated, num_skipped = optimizer.finish()
        ordinary.zero_grad()
        loss_of(reference, step).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
        norms = [torch.nn.utils.clip_grad_norm_(parameter, 9.0).item() for parameter in reference.parameters()]
        ordinary.step()
        assert min(norms) < 9.0 < max(norms), "one is clipped, one is not"
        assert squared == pytest.approx(norm.item() ** 2, rel=1e-5)
        assert (num_updated, num_skipped) == (7, 0)
        assert_same(optimizer, ordinary)


def test_the_norm_does_not_depend_on_the_order_of_gradients() -> None:
    """A continued run has yet to learn the order in which gradients come, and logs what one that never stopped logs."""
    model, continued = Net(), Net()
    orders = [list(net.parameters())[::way] for net, way in ((model, 1), (continued, -1))]
    for step in range(1, 21):
        squared = []
        for net, order in zip((model, continued), orders, strict=True):
            optimizer = PerLayerUpdate(build(net), parameters=order, reduce_grad=lambda tensor: None)
            optimizer.before_backward(is_last=True)
            loss_of(net, step).backward()
            squared.append(optimizer.finish()[0])
            optimizer.close()
        assert squared[0] == squared[1]


def test_groups_come_back_when_an_update_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = PerLayerUpdate(build(model))
    groups = optimizer.param_groups

    def fail() -> None:
        assert len(optimizer.inner.param_groups) == 1 and len(optimizer.inner.param_groups[0]["params"]) == 1
        raise RuntimeError("no memory")

    monkeypatch.setattr(optimizer.inner, "step", fail)
    optimizer.before_backward(is_last=True)
    with pytest.raises(RuntimeError, match="no memory"):
        loss_of(model, 1).backward()
    assert optimizer.param_groups is groups


def test_zero_grad_forgets_an_update_that_was_begun() -> None:
    model = Net()
    optimizer = PerLayerUpdate(build(model))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.before_backward(is_last=False)
    loss_of(model, 1).backward()
    optimizer.zero_grad()
    optimizer.before_backward(is_last=True)
    optimizer.zero_grad()
    loss_of(model, 1).backward()  # not announced any more
    optimizer.zero_grad()
    assert optimizer.finish() == (0.0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parameters_that_come_later_are_refused() -> None:
    """They would have no hook, and their gradients would stay."""
    model = Net()
    optimizer = PerLayerUpdate(torch.optim.AdamW(model.up.parameters()))
    with pytest.raises(TypeError, match="PerLayerUpdate has all its parameters from the start"):
        optimizer.add_param_group({"params": [*model.down.parameters()]})
    assert len(optimizer.param_groups) == 1


def test_a_state_by_index_is_refused() -> None:
    """Checkpoints have it by name, tests/engine/test_checkpoint.py: with and without per-layer update."""
    optimizer = PerLayerUpdate(build(Net()))
    for use in (optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(TypeError, match="PerLayerUpdate is saved by parameter name, see optim/named_state.py"):
            use()


def test_only_restores_in_any_case() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    groups = optimizer.param_groups
    with pytest.raises(KeyError), only(optimizer, groups[0], model.down.weight):
        assert optimizer.param_groups[0]["params"] == [model.down.weight] and optimizer.param_groups[0]["lr"] == 1.0
        raise KeyError
    assert optimizer.param_groups is groups
