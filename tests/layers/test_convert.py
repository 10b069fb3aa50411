"""Replacing linears inside models of any kind, and merging them back."""

import json
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from toy_layers import ReLoRALinear, TwoMatrices

from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.layers.convert import layer_settings, merge_to_dense, replace_linears, restore_layers
from sltrain.methods.sltrain import SUPPORTS


def sltrain_layer(name, linear, **kind):
    return SLTrainLinear(
        linear.in_features,
        linear.out_features,
        rank=4,
        alpha=8,
        bias=linear.bias is not None,
        **{"sparsity": 0.1, **kind},
    )


def low_rank_layer(name, linear):
    return LowRankLinear(linear.in_features, linear.out_features, rank=4, alpha=8, bias=linear.bias is not None)


def everything(name, linear):
    return True


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_a_transformers_llama_trains_with_replaced_projections():
    torch.manual_seed(0)
    model = tiny_llama()
    names = replace_linears(model, lambda name, linear: "lm_head" not in name, sltrain_layer)
    kinds = ["self_attn." + kind for kind in ("q_proj", "k_proj", "v_proj", "o_proj")]
    kinds += ["mlp." + kind for kind in ("gate_proj", "up_proj", "down_proj")]
    assert names == [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in kinds]
    assert isinstance(model.model.layers[1].self_attn.q_proj, SLTrainLinear)
    assert type(model.lm_head) is nn.Linear
    input_ids = torch.randint(50, (2, 9))
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert gradients["model.layers.0.mlp.up_proj.values"].abs().sum() > 0


def test_a_transformers_vit_learns_with_replaced_linears():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTForImageClassification(config)
    names = replace_linears(model, lambda name, linear: "classifier" not in name, sltrain_layer)
    assert len(names) == 2 * 6
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.0 and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "make",
    [low_rank_layer] + [partial(sltrain_layer, support=s, sparsity=0.2, path="factored") for s in SUPPORTS],
)
def test_merging_gives_the_same_function_in_plain_linears(make):
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Sequential(nn.Linear(20, 6, bias=False))).double().eval()
    assert replace_linears(model, everything, lambda name, linear: make(name, linear).double()) == ["0", "2.0"]
    nn.init.normal_(model[0].B)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    assert merge_to_dense(model) == ["0", "2.0"]
    assert [type(module) for module in (model[0], model[2][0])] == [nn.Linear, nn.Linear]
    assert not model[0].training and model[0].weight.dtype == torch.float64 and model[2][0].bias is None
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.0.weight"}
    torch.testing.assert_close(model(x), expected)
    assert merge_to_dense(model) == []


def test_a_layer_without_one_matrix_is_not_merged():
    model = nn.Sequential(TwoMatrices(12, 12, 4, 8))
    with pytest.raises(ValueError, match="no one W"):
        merge_to_dense(model)
    assert type(model[0]) is TwoMatrices


def test_merging_copies_instead_of_sharing_the_bias():
    model = nn.Sequential(sltrain_layer("", nn.Linear(12, 20)))
    bias = model[0].bias
    merge_to_dense(model)
    assert model[0].weight.requires_grad and model[0].bias.data_ptr() != bias.data_ptr()


def test_a_module_in_two_places_stays_one_module():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    assert replace_linears(model, everything, sltrain_layer) == ["first.0"]
    assert isinstance(model["first"][0], SLTrainLinear) and model["first"][0] is model["second"][0]


def test_the_predicate_sees_name_and_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16))
    assert replace_linears(model, lambda name, linear: linear.out_features > 8, sltrain_layer) == ["2"]
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("model", "found"), [(nn.Sequential(nn.Linear(8, 8)), "it has: 0"), (nn.Sequential(nn.ReLU()), "it has: none")]
)
def test_replacing_nothing_is_refused(model, found):
    with pytest.raises(ValueError, match=f"no linear layer of Sequential was chosen for replacement; {found}"):
        replace_linears(model, lambda name, linear: False, sltrain_layer)


def two_linears(bias=True, **like):
    return nn.Sequential(nn.Linear(12, 20, bias=bias, **like), nn.GELU(), nn.Linear(20, 12, bias=bias, **like))


KINDS = {
    "uniform": partial(sltrain_layer, support="uniform"),
    "stratified": partial(sltrain_layer, support="stratified"),
    "block": partial(sltrain_layer, support="block", block_size=3),
    "block of its own size": partial(sltrain_layer, support="block"),
    "column": partial(sltrain_layer, support="column"),
    "slice": partial(sltrain_layer, support="slice"),
    "rolled": partial(sltrain_layer, support="rolled"),
    "low rank": low_rank_layer,
    "of somebody else": lambda name, linear: ReLoRALinear(
        linear.in_features, linear.out_features, rank=4, alpha=8, bias=linear.bias is not None
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_layers_come_back_from_their_settings(kind, bias):
    torch.manual_seed(0)
    model = two_linears(bias)
    replace_linears(model, everything, KINDS[kind])
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.B)
    settings = json.loads(json.dumps(layer_settings(model)))  # as a file gives them back
    assert list(settings) == ["0", "2"]
    restored = two_linears(bias, device="meta", dtype=torch.bfloat16)
    restore_layers(restored, settings)
    assert all(tensor.is_meta for tensor in restored.state_dict().values())
    assert type(restored[0]) is type(model[0]) and repr(restored) == repr(model)
    for ours, theirs in zip(restored.state_dict().items(), model.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and ours[1].shape == theirs[1].shape
        assert ours[1].dtype == (torch.bfloat16 if theirs[1].is_floating_point() else theirs[1].dtype)
    restored.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 12)
    assert torch.equal(restored(x), model(x))


def test_settings_name_every_layer_by_itself():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 6))
    replace_linears(model, lambda name, linear: name == "0", low_rank_layer)
    replace_linears(model, lambda name, linear: name == "1", partial(sltrain_layer, support="column"))
    settings = layer_settings(model)
    assert settings["0"] == {"kind": "low_rank", "rank": 4, "alpha": 8}
    own = {"kind": "sltrain", "rank": 4, "alpha": 8, "sparsity": 0.1, "support": "column", "block_size": None}
    assert settings["1"] == own
    assert settings.keys() == {"0", "1"} and layer_settings(two_linears()) == {}
    restored = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 6))
    restore_layers(restored, settings)
    assert [type(layer) for layer in restored] == [LowRankLinear, SLTrainLinear, nn.Linear]
    # format 1 named no kind
    old = {name: {key: value for key, value in own.items() if key != "kind"} for name, own in settings.items()}
    restored = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 6))
    restore_layers(restored, old)
    assert [type(layer) for layer in restored] == [LowRankLinear, SLTrainLinear, nn.Linear]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"0": {"rank": 4, "alpha": 8}, "5": {"rank": 4, "alpha": 8}}, "no linear called 5"),
        ({"0": {"rank": 4, "alpha": 8}, "1": {"rank": 4, "alpha": 8}}, "no linear called 1"),  # GELU
        ({"0": {"rank": 13, "alpha": 8}}, "0: rank must be between 0 and 12"),
        ({"0": {"rank": 4}}, "0: .*alpha"),
        ({"0": {"rank": 4, "alpha": 8, "sparsity": 2.0}}, "0: sparsity"),
        ({"0": {"rank": 4, "alpha": 8, "sparsity": 0.1, "support": "odd"}}, "0: unknown support"),
        ({"0": {"rank": 4, "alpha": 8, "colour": 1}}, "0: .*colour"),
        ({"": {"rank": 4, "alpha": 8}}, "no linear"),
        (
            {"0": {"kind": "toy_other", "rank": 4}},
            "0 is a layer of kind toy_other, which is not installed .*low_rank",
        ),
    ],
)
def test_settings_that_no_layer_has_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        restore_layers(two_linears(), settings)
