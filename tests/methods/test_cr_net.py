"""method=cr_net: y = B A x + beta y', y' from the layer before, against the same run written anew in float64."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rewritten import Weights, record, rewrite
from torch import Tensor, nn

from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.engine.memory import tensor_peak
from sltrain.layers import LowRankLinear, Rows
from sltrain.layers.kinds.cr_net import CRNetLinear
from sltrain.methods.cr_net import CRNet
from sltrain.models.cache import KeyValueCache
from sltrain.models.llama import LlamaForCausalLM

SHAPE = [
    "model=llama_tiny",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "rank=6",
    "max_steps=1",
    "method=cr_net",
    "method.beta=0.7",
]


def make_model(*overrides: str, num_layers: int = 5, vocab_size: int = 60) -> LlamaForCausalLM:
    config = compose_config([*SHAPE, f"model.num_hidden_layers={num_layers}", *overrides], TRAIN)
    model = build_model(config, vocab_size, torch.float32)
    model.to_empty(device="cpu").init_weights(0)
    return model


def some_ids(num_sequences: int = 2, length: int = 16) -> Tensor:
    return torch.randint(60, (num_sequences, length), generator=torch.Generator().manual_seed(0))


class Chained(nn.Module):
    """A projection that keeps what it gave for the one of the next layer."""

    def __init__(self, own: Weights, before: "Chained | None") -> None:
        super().__init__()
        self.before = [before]  # no submodule
        names = ["weight"] if before is None else ["A", "B", "beta"]
        self.own = nn.ParameterDict({name: nn.Parameter(own[name].clone()) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        before = self.before[0]
        if before is None:
            self.given = x @ self.own["weight"].t()
        else:
            self.given = x @ self.own["A"].t() @ self.own["B"].t() + self.own["beta"] * before.given
        return self.given


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["activation_checkpointing=true"], ["per_layer_update=true"]])
def test_twenty_updates_are_those_of_a_rewrite_in_float64(
    more: list[str], tiny: list[str], metrics_of: Callable, tmp_path: Path
) -> None:
    """float32 rounding is all that differs, also where layers are recomputed or updated inside backward."""
    overrides = [*tiny, "method=cr_net", "model.num_hidden_layers=4", "method.beta=0.6", "lr=0.005"]
    run = record([*overrides, *more], tmp_path / "run", 20, metrics_of)
    made: dict[str, Chained] = {}

    def make(name: str, own: Weights) -> Chained:
        number = int(name.split(".")[2])
        made[name] = Chained(own, made.get(name.replace(f".{number}.", f".{number - 1}.")))
        return made[name]

    theirs = rewrite(overrides, run, make)
    assert len(made) == 28
    assert run.losses == pytest.approx(theirs, rel=3e-5)
    assert run.losses[-1] < run.losses[0] - 0.5
    betas = {name: tensor for name, tensor in run.saved(20).items() if name.endswith("beta")}
    assert len(betas) == 21 and all(abs(beta - 0.6) > 1e-4 for beta in betas.values())


def test_without_beta_it_is_the_low_rank_layer_bit_for_bit() -> None:
    layer = CRNetLinear(40, 24, 6, bias=True, start_beta=0.0, dtype=torch.float32)
    other = LowRankLinear(40, 24, 6, alpha=6, bias=True)
    other.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name != "beta"})
    x, previous = torch.randn(3, 5, 40), torch.randn(3, 5, 24)
    assert torch.equal(layer(x, previous), other(x))
    layer(x, previous).square().sum().backward()
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.grad, layer.get_parameter(name).grad)
    assert layer.beta.grad is not None and layer.beta.grad.abs() > 0


def test_a_model_without_beta_is_a_low_rank_model_with_a_dense_first_layer() -> None:
    model = make_model("method.beta=0")
    shape = [override for override in SHAPE if "method" not in override]
    config = compose_config([*shape, "model.num_hidden_layers=5", "method=low_rank", "alpha=6"], TRAIN)
    other = build_model(config, 60, torch.float32).to_empty(device="cpu")
    other.model.layers[0] = copy.deepcopy(model.model.layers[0])
    other.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not name.endswith("beta")})
    assert torch.equal(model(some_ids()), other(some_ids()))


def test_gradients_are_those_of_autograd() -> None:
    layer = CRNetLinear(12, 20, 4, bias=True, dtype=torch.float64)
    x, previous = (torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (12, 20))
    inputs = (x, previous, *layer.parameters())
    assert torch.autograd.gradcheck(lambda *inputs: layer(*inputs[:2]), inputs)


@pytest.mark.parametrize("num_layers", [2, 3, 4, 7, 9])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(num_layers: int) -> None:
    """Segments of 1, 1, 2, 2 (the first one layer) and 3 layers."""
    results = []
    for checkpointing in ("false", "true"):
        model = make_model(f"activation_checkpointing={checkpointing}", num_layers=num_layers)
        loss = model(some_ids(), some_ids())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    sizes = [len(segment) for segment in model.model.segments()]
    assert sum(sizes) == num_layers and max(sizes) == int(num_layers**0.5)


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_a_cache_gives_what_the_whole_prefix_gives(num_sequences: int) -> None:
    model, ids, cache = make_model().requires_grad_(False), some_ids(num_sequences), KeyValueCache()
    whole = model.model(ids).view(num_sequences, 16, -1)
    for part in [slice(0, 5), *(slice(t, t + 1) for t in range(5, 16))]:
        hidden = model.model(ids[:, part], cache=cache).view(num_sequences, -1, 32)
        torch.testing.assert_close(hidden, whole[:, part], atol=1e-5, rtol=1e-5)


def test_skipped_positions_change_nothing() -> None:
    model, ids = make_model(), some_ids()
    rows = torch.tensor([0, 1, 2, 3, 16, 17, 18, 19, 20, 21])
    torch.testing.assert_close(model(ids, rows=rows), model(ids).flatten(0, 1)[rows], atol=1e-5, rtol=1e-5)


def test_threads_can_share_a_model() -> None:
    """Nothing is kept between calls."""
    model, found = make_model().requires_grad_(False), {}
    wanted = {number: model(some_ids(number)) for number in (1, 2, 3)}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: model(some_ids(number))}))
        for number in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted[number]) for number in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_model_is_the_model(checkpointing: str) -> None:
    model = make_model(f"activation_checkpointing={checkpointing}", num_layers=4)
    torch._dynamo.reset()
    results = []
    for function in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = function(some_ids(), some_ids())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_parameters_are_those_of_the_formula() -> None:
    """Dense matrices in the first decoder layer; r (in + out) and a number a projection in the others."""
    model, (hidden, wide, kv) = make_model("rank_overrides={o_proj:3}"), (32, 48, 16)
    sides = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, wide),
        (hidden, wide),
        (wide, hidden),
    ]
    ranks = [6, 6, 6, 3, 6, 6, 6]
    dense = sum(a * b for a, b in sides)
    later = sum(r * (a + b) + 1 for r, (a, b) in zip(ranks, sides, strict=True))
    others = 2 * 60 * hidden + (2 * 5 + 1) * hidden
    assert sum(parameter.numel() for parameter in model.parameters()) == dense + 4 * later + others
    layer = model.model.layers[1].self_attn.k_proj
    assert layer.multiply_adds() == 6 * (hidden + kv) + kv


def test_the_start() -> None:
    model = make_model("method.gain=0.5", "model.initializer_range=0.04", "rank=16", "model.num_key_value_heads=4")
    first, second = (model.model.layers[number].self_attn.q_proj for number in (0, 1))
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.1)
    values = torch.linalg.svdvals(second.B @ second.A)
    assert values[0].item() == pytest.approx(torch.linalg.svdvals(first.weight)[0].item(), rel=0.15)
    assert second.beta.tolist() == [pytest.approx(0.7)]


@pytest.mark.parametrize("num_rows", [64, 512])
def test_the_footprint_is_what_autograd_keeps(num_rows: int) -> None:
    """Besides x and what the layer before gave."""
    layer = CRNetLinear(256, 384, 16, dtype=torch.float64)
    x, previous = (torch.randn(num_rows, size, dtype=torch.float64, requires_grad=True) for size in (256, 384))
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, previous, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, previous)
    found = layer.footprint(Rows(num_rows, 8, has_kernel=False))
    assert found.kept == sum(kept.values()) == num_rows * 16 * 8
    grad = torch.randn_like(y)
    _, peak = tensor_peak(lambda: torch.autograd.backward(y, grad), 0, torch.device("cpu"))
    passed = sum(tensor.nbytes for tensor in (x, previous))  # gradients
    assert 0.4 * found.temporary <= peak - passed - found.gradients <= 7 / 6 * found.temporary


def test_there_is_no_one_matrix_and_no_layer_alone() -> None:
    layer = CRNetLinear(12, 20, 4)
    assert layer.num_trained == 4 * (12 + 20) + 1
    with pytest.raises(ValueError, match="a layer of kind cr_net is not one matrix"):
        layer.dense_weight()
    with pytest.raises(ValueError, match="kind cr_net cannot start from a dense matrix"):
        CRNetLinear.from_dense(torch.eye(8), rank=2)
    with pytest.raises(TypeError, match="previous"):
        layer(torch.randn(2, 12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "method=cr_net needs rank above 0, and rank is 0"),
        ({"rank": 4, "rank_overrides": {"q_proj": 0}}, "needs rank above 0, and q_proj is 0"),
        ({"rank": 4, "beta": float("nan")}, "method.beta=nan: must be a number"),
        ({"rank": 4, "gain": 0.0}, "method.gain=0.0: must be a number above 0"),
    ],
)
def test_options_are_refused_in_a_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CRNet("cr_net", **options).check()


@pytest.mark.parametrize(
    ("overrides", "num_layers", "words"),
    [
        ([], 1, "set model.num_hidden_layers to 2 or more"),
        (["rank=40"], 2, "layers.1.self_attn.q_proj: rank must be between 0 and 32"),
        (["rank_overrides={*layers.0.*:3}"], 2, "rank_overrides: the pattern '.*' fits no replaced layer"),
    ],
)
def test_models_are_refused_in_a_line(overrides: list[str], num_layers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_model(*overrides, num_layers=num_layers)
