"""method=cola: y = B silu(A x), against the same run written anew in float64; and CoLA-M, the same with less kept."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import resumes_bit_for_bit, stopped_at
from rewritten import Weights, record, rewrite
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.layers import CoLALinear, LowRankLinear
from sltrain.layers.activated import ACTIVATIONS, NONE
from sltrain.methods import base
from sltrain.methods.cola import CoLA
from sltrain.models.llama import LlamaForCausalLM


class WrittenOut(nn.Module):
    def __init__(self, own: Weights) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(own["A"].clone()), nn.Parameter(own["B"].clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.A.t()
        return (hidden / (1 + (-hidden).exp())) @ self.B.t()


@pytest.mark.slow
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs."""
    overrides = [*tiny, "method=cola", "lr=0.01"]
    run = record(overrides, tmp_path / "run", 20, metrics_of)
    theirs = rewrite(overrides, run, lambda name, own: WrittenOut(own))
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5


def test_without_an_activation_it_is_the_low_rank_layer_bit_for_bit() -> None:
    layer = CoLALinear(40, 24, 6, activation="none", bias=True)
    other = LowRankLinear(40, 24, 6, alpha=6, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), other(x)) and torch.equal(layer.dense_weight(), other.dense_weight())
    for one in (layer, other):
        one(x).square().sum().backward()
    pairs = zip(layer.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine.grad, theirs.grad) for mine, theirs in pairs)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, NONE])
def test_gradients_are_those_of_autograd(activation: str) -> None:
    layer = CoLALinear(12, 20, 4, activation, bias=True, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *layer.parameters()))


@pytest.mark.parametrize("gain", [1.0, 0.125])
def test_the_start_has_the_variance_of_the_authors_times_the_squared_gain(gain: float) -> None:
    layer = CoLALinear(400, 600, 100, generator=torch.Generator().manual_seed(0), gain=gain)
    assert layer.A.std().item() == pytest.approx(gain**0.5 * 100_000**-0.25, rel=0.02)
    assert (layer.B @ layer.A).var().item() == pytest.approx(gain**2 / 1000, rel=0.05)


def test_there_is_no_one_matrix_and_no_start_from_one() -> None:
    layer = CoLALinear(12, 20, 4)
    assert layer.num_trained == layer.multiply_adds() == 4 * (12 + 20)
    with pytest.raises(ValueError, match="a layer of kind cola is not one matrix"):
        layer.dense_weight()
    with pytest.raises(ValueError, match="kind cola cannot start from a dense matrix"):
        CoLALinear.from_dense(torch.eye(8), rank=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "method=cola needs rank above 0, and rank is 0"),
        ({"rank": 4, "rank_overrides": {"q_proj": 0}}, "needs rank above 0, and q_proj is 0"),
        ({"rank": 4, "activation": "tanh"}, "method.activation=tanh: choose one of silu, gelu, relu, none"),
    ],
)
def test_options_are_refused_in_a_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CoLA("cola", **options).check()


def test_a_layer_refuses_what_it_cannot_be() -> None:
    for arguments, words in (((8, 8, 0), "rank of at least 1"), ((8, 8, 2, "tanh"), "choose one of silu")):
        with pytest.raises(ValueError, match=words):
            CoLALinear(*arguments)
    assert base.ACTIVATIONS == (*ACTIVATIONS, NONE)


# ---- CoLA-M


def model_of(tiny: list[str], *typed: str) -> LlamaForCausalLM:
    config = compose_config([*tiny, *([] if "method=dlr" in typed else ["method=cola"]), *typed], TRAIN)
    model = build_model(config, 512, torch.float32)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
    return model


@pytest.mark.parametrize("method", ["method=cola", "method=dlr"])
def test_the_methods_hand_gain_to_their_layers(tiny: list[str], method: str) -> None:
    layer = model_of(tiny, method, "method.gain=0.5").get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, CoLALinear) and layer.gain == 0.5


def loss_and_gradients(model: LlamaForCausalLM, **how: Tensor) -> list[Tensor]:
    ids = torch.randint(512, (3, 24), generator=torch.Generator().manual_seed(0))
    loss = model(ids, ids, **how)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


PLACES = (torch.arange(24) % 10).expand(3, 24)


@pytest.mark.parametrize(
    ("typed", "how"),
    [
        ([], {}),
        (["method.activation=none", "model.num_key_value_heads=1"], {}),
        (["method=dlr", "rank=7"], {}),  # its residual is of the narrow h, too
        (["activation_checkpointing=true"], {}),
        (["precision=mixed"], {}),
        (["precision=mixed", "activation_checkpointing=true"], {}),
        (["attention=document", "padding=pack"], {"positions": PLACES}),
        ([], {"rows": torch.tensor([0, 1, 2, 24, 25, 48, 49, 50])}),
    ],
)
def test_what_is_computed_again_is_the_same_bit_for_bit(typed: list[str], how: dict, tiny: list[str]) -> None:
    plain = loss_and_gradients(model_of(tiny, *typed), **how)
    again = loss_and_gradients(model_of(tiny, *typed, "method.recompute=true"), **how)
    assert len(again) == 36 and all(map(torch.equal, plain, again))


class Counts(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_no_product_with_A_and_only_one_with_B_is_computed_again(tiny: list[str]) -> None:
    """Which is what the paper spends: wide outputs that something reads in backward, and attention, once more."""
    counts = []
    for recompute in ("true", "false"):
        model = model_of(tiny, f"method.recompute={recompute}")
        with Counts() as seen:
            loss_and_gradients(model)
        counts.append(seen.of)
    more = {name: number for name, number in (counts[0] - counts[1]).items() if "mm" in name or "attention" in name}
    assert more == {"mm": 2 * 5, "_scaled_dot_product_flash_attention_for_cpu": 2}  # two layers; q, k, v, gate, up


def test_a_model_that_recomputes_generates_and_is_not_told_apart(tiny: list[str]) -> None:
    plain, thin = model_of(tiny), model_of(tiny, "method.recompute=true")
    ids = torch.randint(512, (2, 9))
    with torch.no_grad():
        assert torch.equal(plain(ids), thin(ids))
    layers = [model.get_submodule("model.layers.0.mlp.up_proj") for model in (plain, thin)]
    assert layers[0].settings() == layers[1].settings()  # nothing for an export to store


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["per_layer_update=true"], ["activation_checkpointing=true"]])
def test_a_run_is_the_one_that_keeps_everything_and_may_switch(
    how: list[str], tiny: list[str], sltrain_train: Callable, tmp_path: Path
) -> None:
    """Stopped and continued, and continued with the key switched."""
    typed = [*tiny, "method=cola", *how]
    resumes_bit_for_bit([*typed, "method.recompute=true"], sltrain_train, tmp_path, [3])
    straight = tmp_path / "straight"
    plain = ["method.recompute=false", "checkpoint_every=1", "keep_last=99"]
    switched = stopped_at(straight, 2, tmp_path / "switched")
    for folder in (switched, tmp_path / "plain"):
        code, _, err = sltrain_train(*typed, *plain, f"run_dir={folder}")
        assert code == 0, err
    last = "checkpoints/step_00000006/model.safetensors"
    wanted = (straight / last).read_bytes()
    assert (switched / last).read_bytes() == (tmp_path / "plain" / last).read_bytes() == wanted
