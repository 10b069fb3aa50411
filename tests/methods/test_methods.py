"""The layers of each method, overrides, and error messages."""

from dataclasses import fields

import pytest
import torch
from torch import nn
from toy_layers import ReLoRALinear

from sltrain.config import ModelConfig
from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.support import KINDS
from sltrain.methods.advice import warnings, weight_norms
from sltrain.methods.base import METHODS, Method, pattern_fits
from sltrain.methods.sltrain import SUPPORTS
from sltrain.models.llama import LlamaForCausalLM


def make_model(device="meta", dtype=torch.float32):
    """Two blocks of two linears and a head that is never chosen."""

    def block():
        return nn.ModuleDict(
            {
                "q_proj": nn.Linear(32, 16, device=device, dtype=dtype),
                "up_proj": nn.Linear(16, 48, bias=False, device=device, dtype=dtype),
            }
        )

    return nn.ModuleDict(
        {"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(48, 10, device=device, dtype=dtype)}
    )


def chosen(name, linear):
    return name != "head"


NAMES = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj"]


def make_method(method, **changes) -> Method:
    """The method with rank 4, sparsity 0.1, alpha 8, where it has these options, and the changes."""
    kind = METHODS.load(method)
    options = {"rank": 4, "sparsity": 0.1, "alpha": 8.0, "support": "uniform"}
    names = {item.name for item in fields(kind)}
    return kind(name=method, **{key: value for key, value in options.items() if key in names} | changes)


@pytest.mark.parametrize("method", ["full", "low_rank"])
def test_gain_scales_the_start_of_the_projections_alone(method):
    """Measured against the model's own initializer_range: B A of full rank is a dense start."""
    shape = ModelConfig("m", 64, 64, 2, 2, vocab_size=500, initializer_range=0.05)
    model = LlamaForCausalLM(shape)
    options = {"gain": 0.5} | ({"rank": 64} if method == "low_rank" else {})
    names = make_method(method, **options).replace(model, lambda name, linear: name != "lm_head")
    model.init_weights(seed=0)
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight if method == "full" else layer.dense_weight()
        assert weight.std().item() == pytest.approx(0.025, rel=0.05), name
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(("method", "kind"), [("sltrain", SLTrainLinear), ("low_rank", LowRankLinear)])
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.bfloat16), ("cpu", torch.float64)])
def test_chosen_linears_are_replaced_on_their_device_in_their_dtype(method, kind, device, dtype):
    model = make_model(device, dtype)
    assert make_method(method).replace(model, chosen) == NAMES
    for name in NAMES:
        layer = model.get_submodule(name)
        assert type(layer) is kind and layer.rank == 4 and layer.scale == 2
        assert all(p.device.type == device and p.dtype == dtype for p in layer.parameters())
        assert (layer.bias is None) == ("up_proj" in name)
    assert type(model["head"]) is nn.Linear


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_full_keeps_every_parameter_as_it_is(device):
    model = make_model(device)
    before = model.state_dict()
    assert make_method("full").replace(model, chosen) == NAMES
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in NAMES)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(after[name].shape == before[name].shape for name in before)
    assert device == "meta" or all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("support", "block_size"), [("block", 4), *((kind, None) for kind in KINDS)])
def test_the_support_reaches_every_layer(support, block_size):
    model = make_model()
    make_method("sltrain", support=support, block_size=block_size).replace(model, chosen)
    supports = [model.get_submodule(name).support for name in NAMES]
    assert all((s.kind, s.block_size) == (support, block_size) for s in supports)


def test_overrides_reach_the_layers_they_name_and_the_last_wins():
    model = make_model()
    method = make_method(
        "sltrain",
        rank_overrides={"*_proj": 5, "q_proj": 6, "layers.1.*": 0},
        sparsity_overrides={"up_proj": 0.0, "layers.1.*": 0.5},
    )
    method.replace(model, chosen)
    found = {name: (model.get_submodule(name).rank, model.get_submodule(name).support.sparsity) for name in NAMES}
    assert found == {
        "layers.0.q_proj": (6, 0.1),
        "layers.0.up_proj": (5, 0.0),
        "layers.1.q_proj": (0, 0.5),
        "layers.1.up_proj": (0, 0.5),
    }


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.*.up_proj", True),
        ("up_proj", True),
        ("mlp", True),
        ("*_proj", True),
        ("model.layers.[0-3].*", True),
        ("proj", False),
        ("up", False),
        ("layers.0", False),
        ("UP_PROJ", False),
    ],
)
def test_patterns_fit_the_name_or_one_of_its_parts(pattern, fits):
    assert pattern_fits(pattern, "model.layers.0.mlp.up_proj") is fits


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [("sltrain", "rank_overrides", 4), ("sltrain", "sparsity_overrides", 0.1), ("low_rank", "rank_overrides", 4)],
)
@pytest.mark.parametrize("pattern", ["k_proj", "head"])
def test_a_pattern_that_fits_nothing_is_named_with_names_to_use(method, key, value, pattern):
    model = make_model()
    with pytest.raises(ValueError) as error:
        make_method(method, **{key: {"q_proj": value, pattern: value}}).replace(model, chosen)
    for word in (key, repr(pattern), "layers.0.q_proj", "up_proj"):
        assert word in str(error.value)
    assert type(model.get_submodule("layers.0.q_proj")) is nn.Linear  # nothing was touched


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sltrain", {"rank": -1}, "layers.0.q_proj: rank must be between 0 and 16 for a 16 x 32 matrix, got -1"),
        ("low_rank", {"rank": -1}, "layers.0.q_proj: rank must be between 0 and 16"),
        ("low_rank", {"rank": 0}, "layers.0.q_proj: a layer of kind low_rank needs a rank of at least 1"),
        ("sltrain", {"rank_overrides": {"up_proj": 17}}, "layers.0.up_proj: rank must be between 0 and 16 .* got 17"),
        ("sltrain", {"sparsity": 1.0}, r"layers.0.q_proj: sparsity .* must be in \[0, 1\), got 1.0"),
        ("sltrain", {"sparsity": -0.5}, r"layers.0.q_proj: sparsity .* must be in \[0, 1\), got -0.5"),
        ("sltrain", {"rank": 0, "sparsity": 0.0}, "layers.0.q_proj: rank 0 and sparsity 0.0 leave nothing to train"),
    ],
)
def test_impossible_settings_are_refused_by_name(method, changes, message):
    with pytest.raises(ValueError, match=message):
        make_method(method, **changes).replace(make_model(), chosen)


@pytest.mark.parametrize("method", ["sltrain", "low_rank"])
def test_choosing_nothing_is_refused(method):
    with pytest.raises(ValueError, match="no linear layer of ModuleDict was chosen"):
        make_method(method, rank_overrides={"q_proj": 2}).replace(make_model(), lambda name, linear: False)


def test_layers_that_cannot_pay_are_named_in_one_line():
    model = make_model()
    make_method("sltrain", rank_overrides={"q_proj": 11}).replace(model, chosen)
    (heavy,) = warnings(model)
    # 11 * (32 + 16) + int(0.1 * 512) = 579 values for 512; up_proj: 4 * 64 + 76 = 332 for 768
    assert "2 of 4 layers" in heavy and "layers.0.q_proj: 579 for 16 x 32" in heavy


def test_a_product_exactly_as_large_as_the_matrix_does_not_pay():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    make_method("low_rank", rank=2).replace(model, lambda name, linear: True)
    assert len(warnings(model)) == 1 and "1 of 1 layers" in warnings(model)[0]


def test_nothing_to_warn_about():
    model = make_model()
    make_method("low_rank").replace(model, chosen)
    assert warnings(model) == [] == warnings(make_model())


def test_a_support_without_full_rank_says_so():
    model = make_model()
    make_method("sltrain", support="column").replace(model, chosen)
    assert [line for line in warnings(model) if "rank at most rank + columns (the first layer: 4 + 3 of 16)" in line]


def test_norms_are_the_roots_of_sums_of_squares_over_all_layers():
    """Two products with norms 3 and 4 make 5, and so do two S."""
    model = nn.Sequential(SLTrainLinear(4, 4, 1, 0.5, alpha=2), SLTrainLinear(4, 4, 1, 0.5, alpha=2))
    for layer, norm in zip(model, (3.0, 4.0), strict=True):
        for tensor in layer.parameters():
            nn.init.zeros_(tensor)
        with torch.no_grad():
            layer.A[0, 0], layer.B[2, 0], layer.values[0] = norm, 0.5, 2 * norm
    assert weight_norms(model) == {"low_rank_norm": pytest.approx(5), "sparse_norm": pytest.approx(10)}
    assert weight_norms(nn.Sequential(nn.Linear(4, 4))) == {}


def test_norms_of_other_parts_come_beside_them():
    layer = ReLoRALinear(4, 4, 1, alpha=1)
    for tensor in layer.parameters():
        nn.init.zeros_(tensor)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    low_rank = LowRankLinear(4, 4, 1, 1)
    product = (low_rank.B @ low_rank.A).norm().item()
    found = weight_norms(nn.Sequential(layer, low_rank))
    assert found == {"low_rank_norm": pytest.approx(product), "sparse_norm": 0, "dense_norm": 8}


def test_only_trained_values_have_to_pay():
    assert warnings(nn.Sequential(ReLoRALinear(8, 8, 2, alpha=1))) == []  # 32 of 64 are trained
    (line,) = warnings(nn.Sequential(ReLoRALinear(8, 8, 4, alpha=1)))
    assert "64 for 8 x 8" in line


def test_every_kind_of_support_can_be_typed():
    assert set(SUPPORTS) == set(KINDS)
