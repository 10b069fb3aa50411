"""The interface of a layer kind; what a kind does not define is an error, never a guess."""

import pytest
import torch
from torch import nn
from toy_layers import Adapted, ReLoRALinear, SilentLinear, TwoMatrices

from sltrain.layers import LAYERS, LowRankLinear, ReplacedLinear, SLTrainLinear
from sltrain.layers.base import check_known, parts_of


def test_the_default_dense_weight_is_the_sum_of_the_parts() -> None:
    layer = ReLoRALinear(12, 8, 3, alpha=6)
    x = torch.randn(5, 12)
    torch.testing.assert_close(x @ layer.dense_weight().t(), layer(x))
    assert not layer.dense_weight().requires_grad
    assert layer.num_trained == 3 * (12 + 8)
    assert repr(layer) == "ReLoRALinear(in_features=12, out_features=8, rank=3, alpha=6, bias=False)"


def test_a_kind_is_registered_under_its_name() -> None:
    assert LAYERS.load("toy_relora") is ReLoRALinear and ReLoRALinear.kind == "toy_relora"
    with pytest.raises(ValueError, match="layer=toy_other does not exist; there are: .*low_rank.*sltrain"):
        LAYERS.load("toy_other")

    class Variant(SLTrainLinear):
        """Without a kind of its own it is one of its parent's."""

    assert Variant.kind == "sltrain" and LAYERS.load("sltrain") is SLTrainLinear


def test_parts_of_a_linear() -> None:
    linear = nn.Linear(4, 3)
    (name, part), *others = parts_of("x", linear).items()
    assert name == "W" and not others and torch.equal(part.dense(), linear.weight)
    assert list(parts_of("x", LowRankLinear(8, 8, 2, 4))) == ["BA"]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Bilinear(4, 4, 4), "model.q_proj is a Bilinear: neither an nn.Linear nor a ReplacedLinear"),
        (Adapted(4, 4), "model.q_proj is a Adapted: neither"),
        (SilentLinear(4, 4), r"model.q_proj: SilentLinear does not define parts\(\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_is_guessed_of_an_unknown_layer(module: nn.Module, words: str) -> None:
    for ask in (check_known, parts_of):
        with pytest.raises(ValueError, match=words):
            ask("model.q_proj", module)


def test_a_layer_without_one_matrix_is_known_but_has_no_parts() -> None:
    layer = TwoMatrices(8, 8, 2, 4)
    check_known("x", layer)
    for ask in (layer.dense_weight, lambda: parts_of("x", layer)):
        with pytest.raises(ValueError, match="no one W"):
            ask()


def test_what_a_kind_does_not_define_is_named() -> None:
    layer = SilentLinear(4, 4)
    for ask, words in (
        (layer.parts, "define parts"),
        (layer.settings, "define settings"),
        (layer.multiply_adds, "define multiply_adds"),
        (lambda: layer.footprint(None), "SilentLinear does not define footprint"),  # type: ignore[arg-type]
        (lambda: SilentLinear.from_dense(torch.eye(4)), "kind toy_silent cannot start from a dense matrix"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
    assert layer.warnings() == {} and layer.PATHS == () and repr(layer).startswith("SilentLinear(in_features=4")
    with pytest.raises(ValueError, match="unknown path 'composed': choose one of auto"):
        ReplacedLinear(4, 4, path="composed")
