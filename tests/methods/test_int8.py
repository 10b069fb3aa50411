"""method=int8: updates of weights in codes against a rewrite in float64, inside backward, and what is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import make_optimizer, make_options
from torch import Tensor, nn

from sltrain.building.trainer import held_in_codes
from sltrain.compose import TRAIN, compose_config
from sltrain.config_checks import validate
from sltrain.layers.kinds.int8 import Int8Linear
from sltrain.methods.advice import warnings
from sltrain.optim.build import build_optimizer, state_bytes, step_bytes
from sltrain.optim.named_state import load_named_state, named_state
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.optim.rounding import generator_of_update
from sltrain.parameters import ParamInfo

CPU = torch.device("cpu")
OUT, IN, LR, DECAY, UPDATES = 32, 24, 0.05, 0.1, 20


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.q_proj = Int8Linear(IN, OUT, generator=draws, dtype=dtype)
        self.norm = nn.LayerNorm(OUT, dtype=dtype)
        self.down_proj = Int8Linear(OUT, IN, generator=draws, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.norm(self.q_proj(x)))


def make_for(net: nn.Module, name: str, **how: Any) -> torch.optim.Optimizer:
    settings = {"lr": LR, "weight_decay": DECAY, "device": CPU, "seed": 3, "in_codes": held_in_codes(net)}
    return make_optimizer(net.named_parameters(), name=name, **settings | how)


def gradients() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(UPDATES):
        yield torch.randn(OUT, IN, generator=generator)


def decoded(codes: Tensor, steps: list[float], zeros: list[float]) -> Tensor:
    groups = [step * (group.double() - zero) for group, step, zero in zip(codes.split(256), steps, zeros, strict=True)]
    return torch.cat(groups)


def test_twenty_updates_are_the_formulas() -> None:
    """Gradient descent; each group of 256 is rounded by the numbers that the update draws. A number next to a border
    may fall on the other side of it in float32."""
    net = Net()
    optimizer = make_for(net, "sgd")
    layer = net.q_proj
    codes, steps, zeros = layer.codes.flatten().clone(), layer.steps.view(torch.float32).tolist(), layer.zeros.tolist()
    for update, grad in enumerate(gradients(), start=1):
        layer.weight.grad = grad
        optimizer.step()
        w = decoded(codes, steps, zeros) * (1 - LR * DECAY) - LR * grad.double().flatten()
        u = torch.rand(OUT * IN // 256, 256, generator=generator_of_update(CPU, 3, 0, update)).double()
        groups = w.view(-1, 256)
        span = groups.amax(1).clamp_min(0) - groups.amin(1).clamp_max(0)
        steps = (span / 254).tolist()
        zeros = [-(-max(-g.min().item(), 0) // s) for g, s in zip(groups, steps, strict=True)]
        rows = [(g / s + drawn).floor() + z for g, s, z, drawn in zip(groups, steps, zeros, u, strict=True)]
        codes = torch.cat(rows)
        assert (layer.codes.flatten() != codes).float().mean() < 0.01, update
        assert layer.steps.view(torch.float32).tolist() == pytest.approx(steps, rel=1e-5)
        codes = layer.codes.flatten().double()  # the few that differ do not add up
        steps, zeros = layer.steps.view(torch.float32).tolist(), layer.zeros.tolist()


def test_updates_far_below_a_step_add_up() -> None:
    """A hundredth of a step each; rounded to the nearest code all of them would be lost."""
    net = Net()
    before, step = net.q_proj.dense_weight(), net.q_proj.steps.view(torch.float32).mean().item()
    optimizer = make_for(net, "sgd", lr=0.01 * step, weight_decay=0.0)
    for _ in range(300):
        net.q_proj.weight.grad = -torch.ones(OUT, IN)
        optimizer.step()
    moved = (net.q_proj.dense_weight() - before) / step
    assert moved.mean().item() == pytest.approx(3, rel=0.1) and moved.std() > 0.3


def steps_of(net: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        x = torch.randn(6, IN, generator=torch.Generator().manual_seed(number)).to(net.norm.weight.dtype)
        loss = (net(x) - x).square().sum()
        if isinstance(optimizer, PerLayerUpdate):
            optimizer.before_backward(is_last=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = ["q_galore", "adamw", "scale", "apollo_mini", "muon", "adafactor"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inside_backward_and_continued_it_is_the_ordinary_run(name: str, dtype: torch.dtype) -> None:
    """bfloat16: norms are rounded at random too."""
    how = {"stochastic_rounding": dtype == torch.bfloat16}
    nets = [Net(dtype) for _ in range(3)]
    straight = make_for(nets[0], name, **how)
    steps_of(nets[0], straight, 0, 6)
    steps_of(nets[1], PerLayerUpdate(make_for(nets[1], name, **how)), 0, 6)
    first = make_for(nets[2], name, **how)
    steps_of(nets[2], first, 0, 4)
    second = make_for(nets[2], name, **how)
    load_named_state(second, named_state(first))
    steps_of(nets[2], second, 4, 6)
    for net in nets[1:]:
        for key, tensor in net.state_dict().items():
            assert torch.equal(tensor, nets[0].state_dict()[key]), key
    assert not torch.equal(nets[0].q_proj.codes, Net(dtype).q_proj.codes)
    held = [v.nbytes for state in straight.state.values() for v in state.values() if isinstance(v, Tensor)]
    infos = [
        ParamInfo(name, tuple(p.shape), p.element_size(), "gain" if "norm" in name else "projection", "proj" in name)
        for name, p in nets[0].named_parameters()
    ]
    assert sum(held) == state_bytes(make_options(name), infos, how["stochastic_rounding"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["q_galore", "scale"])
def test_an_update_takes_no_more_memory_than_planned(name: str, dtype: torch.dtype) -> None:
    from sltrain.engine.memory import tensor_peak

    layer = Int8Linear(256, 256, dtype=dtype)
    info = ParamInfo("up.weight", (256, 256), dtype.itemsize, "projection", in_codes=True)
    options = make_options(name)
    optimizer = build_optimizer(
        [("up.weight", layer.weight)], options, lr=0.1, weight_decay=0.0, device=CPU, in_codes=layer.held_in_codes()
    )
    for _ in range(2):
        layer.weight.grad = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
        _, peak = tensor_peak(optimizer.step, 0, CPU)
    assert 0.5 <= peak / step_bytes(options, [info], "cpu") <= 1.02


def test_as_many_values_as_a_dense_matrix_are_no_reason_to_warn() -> None:
    assert warnings(Net()) == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("ema=0.9", "ema=0.9 averages each tensor by itself, and method=int8 holds W in codes"),
        ("method.gain=0", "method.gain=0.0: must be a number above 0"),
        ("method.weights=int4", "unknown key 'method.weights'"),
    ],
)
def test_what_cannot_be_is_one_line(typed: str, said: str, tiny: list[str]) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        validate(compose_config([*tiny, "method=int8", *typed.split()], TRAIN))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_it_begins_with_a_dense_run_and_a_dense_run_with_it(
    tiny: list[str], sltrain_train: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """W changes by half a step on the way in and by one in an update of no length, and not at all on the way out."""
    import sltrain

    dense, coded, again = (tmp_path / name for name in ("dense", "coded", "again"))
    runs = [(dense, "full", []), (coded, "int8", [f"init_from={dense}"]), (again, "full", [f"init_from={coded}"])]
    for folder, method, start in runs:
        how = ["lr=1e-30", "warmup_steps=0", "max_steps=1"] if start else []
        code, out, err = sltrain_train(*tiny, f"method={method}", f"run_dir={folder}", *start, *how)
        assert code == 0, err
    name = "model.layers.1.mlp.down_proj"
    layers: list[Any] = [sltrain.load(folder).get_submodule(name) for folder in (dense, coded, again)]
    theirs, held, back = layers[0].weight, layers[1].dense_weight(), layers[2].weight
    assert 0 < (held - theirs).abs().max() <= 1.51 * layers[1].steps.view(torch.float32).max()
    torch.testing.assert_close(back, held)
