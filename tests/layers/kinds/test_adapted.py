"""The frozen W0 of relora, switchlora and gradnorm_lorp in a dtype of its own."""

from typing import Any

import pytest
import torch
from torch import nn

from sltrain.layers import adapted
from sltrain.layers.adapted import AdaptedLinear
from sltrain.layers.base import LAYERS, Rows
from sltrain.methods import base

KINDS = ["relora", "switchlora", "gradnorm_lorp"]


def layer_of(kind: str, dtype: torch.dtype = torch.float32, **own: Any) -> AdaptedLinear:
    generator = torch.Generator().manual_seed(0)
    cls: Any = LAYERS.load(kind)
    layer: AdaptedLinear = cls(24, 16, 4, 8.0, generator=generator, dtype=dtype, **own)
    nn.init.normal_(layer.B, std=0.1, generator=generator)
    return layer


def gradients(layer: AdaptedLinear, x: torch.Tensor) -> list[torch.Tensor | None]:
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_W0_is_the_float32_layer_with_its_values(kind: str) -> None:
    """Casting to float32 loses nothing: outputs, gradients and W are equal bit for bit."""
    narrow = layer_of(kind, frozen_dtype="bfloat16")
    assert narrow.W0.dtype == torch.bfloat16 and narrow.A.dtype == torch.float32
    wide = layer_of(kind)
    wide.load_state_dict(narrow.state_dict())
    assert wide.W0.dtype == torch.float32 and torch.equal(wide.W0, narrow.W0.float())
    x = torch.randn(5, 24)
    assert torch.equal(narrow(x), wide(x)) and torch.equal(narrow.dense_weight(), wide.dense_weight())
    for mine, theirs in zip(gradients(narrow, x), gradients(wide, x), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_W0_serves_bfloat16_arithmetic(kind: str) -> None:
    layer = layer_of(kind, torch.bfloat16, frozen_dtype="float32")
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    y = layer(x)
    assert layer.W0.dtype == torch.float32 and y.dtype == layer.dense_weight().dtype == torch.bfloat16
    exact = nn.functional.linear(x.float(), layer.dense_weight().float())
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_of(kind, frozen_dtype="bfloat16")(x.float()).dtype == torch.bfloat16


def test_a_dtype_is_a_setting_and_the_usual_one_is_not_stored() -> None:
    layer = layer_of("relora", frozen_dtype="bfloat16")
    assert layer.settings() == {"rank": 4, "alpha": 8.0, "frozen_dtype": "bfloat16"}
    assert layer_of("relora").settings() == {"rank": 4, "alpha": 8.0}
    assert "frozen_rounding" not in layer_of("relora", frozen_dtype="bfloat16", frozen_rounding="stochastic").settings()


def merged(rounding: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """What W was before a merge, and W0 after it."""
    layer = layer_of("relora", frozen_dtype="bfloat16", frozen_rounding=rounding)
    layer.B.data.mul_(5e-3)  # B A is less than a unit in the last place of most of W0
    before = layer.dense_weight().clone()
    layer.merge(torch.Generator().manual_seed(seed))  # type: ignore[operator]
    return before, layer.W0.float()


def test_a_merge_rounds_once_to_the_nearest_or_right_on_average() -> None:
    exact, nearest = merged("nearest")
    assert torch.equal(nearest, exact.bfloat16().float())
    drawn = torch.stack([merged("stochastic", seed)[1] for seed in range(300)])
    unit = 2.0**-7 * exact.abs()
    assert bool(((drawn - exact).abs() <= unit).all()), "one of its two neighbours"
    assert (drawn.mean(0) - exact).norm() < 0.2 * (nearest - exact).norm()
    assert torch.equal(drawn[3], merged("stochastic", 3)[1]) and not torch.equal(drawn[3], drawn[4])


def test_an_exchange_keeps_W_up_to_the_rounding_of_W0() -> None:
    for rounding in ("nearest", "stochastic"):
        layer = layer_of("switchlora", frozen_dtype="bfloat16", frozen_rounding=rounding)
        before = layer.dense_weight().clone()
        layer.switch(2, 1, torch.Generator().manual_seed(0))  # type: ignore[operator]
        change = (layer.dense_weight() - before).norm() / before.norm()
        assert 0 < change < 2**-6


def test_what_a_W0_of_another_dtype_takes_is_counted() -> None:
    rows = Rows(32, 4, False)
    usual, narrow = layer_of("relora"), layer_of("relora", frozen_dtype="bfloat16")
    more = narrow.footprint(rows).temporary - usual.footprint(rows).temporary
    assert more == 4 * 24 * 16  # one W0 in the dtype of x
    assert usual.absorb_bytes == 0 and narrow.absorb_bytes == 4 * (2 * 24 * 16 + 4 * (24 + 16))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"frozen_dtype": "float16"}, "frozen_dtype is 'float16'; choose one of float32, bfloat16"),
        ({"frozen_rounding": "up"}, "frozen_rounding is 'up'; choose one of nearest, stochastic"),
        ({"frozen_rounding": "stochastic"}, "is for a W0 in bfloat16, and it is float32; set frozen_dtype=bfloat16"),
    ],
)
def test_a_layer_refuses_what_W0_cannot_be(own: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer_of("relora", **own)


def test_methods_know_the_words_of_the_layer() -> None:
    assert (base.FROZEN_DTYPES, base.ROUNDINGS) == (adapted.FROZEN_DTYPES, adapted.ROUNDINGS)
