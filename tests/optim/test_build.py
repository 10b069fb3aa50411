"""Every trainable parameter is in exactly one group, and the optimizers are torch's and bitsandbytes' own."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import ALONE, make_optimizer, make_options
from torch import nn

from sltrain.optim.build import (
    build_optimizer,
    check_takes,
    check_updates,
    parameter_groups,
    set_learning_rate,
    state_bytes,
    step_bytes,
    trained_parameters,
)
from sltrain.optim.composite import Composite
from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.optim.named_state import load_named_state, named_state, rebuild_optimizer
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.parameters import ParamInfo, is_gain_or_bias

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "device": CPU}


class Block(nn.Module):
    """The kinds of parameters a model has, under their usual names."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q_proj = nn.Linear(6, 6, dtype=dtype)
        self.input_layernorm = nn.LayerNorm(6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.values = nn.Parameter(torch.zeros(20, dtype=dtype))
        self.A = nn.Parameter(torch.zeros(0, 6, dtype=dtype))
        self.frozen = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def build(name: str, named: Any, **how: Any) -> torch.optim.Optimizer:
    """The optimizer, or a skipped test where its package is missing."""
    if (package := OPTIMIZERS.load(name).package) is not None:
        pytest.importorskip(package)
    return make_optimizer(named, name=name, **{**SETTINGS, **how})


def set_gradients(parameters: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.input_layernorm.weight", True),
        ("model.layers.0.post_attention_layernorm.weight", True),
        ("model.norm.weight", True),
        ("norm.weight", True),
        ("vit.layer.0.layernorm_before.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("model.layers.0.self_attn.q_proj.values", False),
        ("model.layers.0.mlp.up_proj.A", False),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("weight", False),
        ("norm.scale_table", False),
    ],
)
def test_gains_and_biases_by_name(name: str, expected: bool) -> None:
    assert is_gain_or_bias(name) is expected


def test_groups_of_a_model() -> None:
    block = Block()
    decay, no_decay = parameter_groups(trained_parameters(block.named_parameters(), {}), 0.1)
    assert decay["weight_decay"] == 0.1 and no_decay["weight_decay"] == 0.0
    assert [id(p) for p in decay["params"]] == [id(p) for p in (block.values, block.A, block.q_proj.weight)]
    others = [block.q_proj.bias, block.input_layernorm.weight, block.input_layernorm.bias]
    assert {id(p) for p in no_decay["params"]} == {id(p) for p in [*others, block.norm.weight, block.norm.bias]}


names = st.lists(
    st.sampled_from(["model", "0", "norm", "input_layernorm", "q_proj", "weight", "bias", "values", "A"]), min_size=1
).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(names, st.booleans(), st.integers(0, 5)), min_size=1, max_size=12))
def test_each_trainable_parameter_is_in_exactly_one_group(described: list[tuple[str, bool, int]]) -> None:
    pool = [
        nn.Parameter(torch.zeros(1), requires_grad=index % 3 != 2) for index in range(6)
    ]  # repeats are tied weights
    named = [(name, pool[index]) for name, _, index in described]
    wanted = {id(parameter) for _, parameter in named if parameter.requires_grad}
    if not wanted:
        with pytest.raises(ValueError, match="no trainable parameter"):
            trained_parameters(named, {})
        return
    groups = parameter_groups(trained_parameters(named, {}), 0.1)
    got = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(got) == len(set(got)) and set(got) == wanted
    assert all(group["params"] for group in groups)
    first_name = {id(parameter): name for name, parameter in reversed(named)}
    for group in groups:
        assert {is_gain_or_bias(first_name[id(p)]) for p in group["params"]} == {group["weight_decay"] == 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs_step_for_step(dtype: torch.dtype) -> None:
    ours, fused, plain = Block(dtype), Block(dtype), Block(dtype)
    optimizer = make_optimizer(ours.named_parameters(), name="adamw", **{**SETTINGS, "weight_decay": 0.0})
    references = [
        torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0.0, **how
        )
        for module, how in ((fused, {"fused": True}), (plain, {"foreach": False}))
    ]
    for step in range(1, 8):
        for module in (ours, fused, plain):
            set_gradients([p for p in module.parameters() if p.requires_grad], step)
        for each in (optimizer, *references):
            set_learning_rate(each, 1e-2 / step)
            each.step()
        for p, q, r in zip(ours.parameters(), fused.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)
            if dtype == torch.float32:
                torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype == dtype


def test_weight_decay_reaches_weights_only() -> None:
    block = Block()
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    optimizer = make_optimizer(block.named_parameters(), name="adamw", **SETTINGS)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in block.named_parameters():
        shrunk = before[name] * (1 - 1e-2 * 0.1) if name in ("q_proj.weight", "values", "A") else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_gradient_with_transposed_memory_is_applied_right() -> None:
    """The fused CPU kernel ignores a gradient's strides; autograd stores gradients in their parameter's layout."""
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for name in ("ours", "plain"):
        parameter = nn.Parameter(weight.clone())
        (parameter * pull.t()).sum().backward()
        groups = [("weight", parameter)]
        optimizer = (
            make_optimizer(groups, name="adamw", **SETTINGS)
            if name == "ours"
            else torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
        )
        optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1])


def test_eight_bit_adam_follows_adam_on_a_quadratic() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    target = torch.randn(80, 64, generator=torch.Generator().manual_seed(1))  # 5120 elements: 8-bit states
    curvature = torch.rand(80, 64, generator=torch.Generator().manual_seed(2)) + 0.5
    losses: dict[str, list[float]] = {}
    for name in ("adamw", "adam8bit"):
        weight = nn.Parameter(torch.zeros(80, 64))
        optimizer = make_optimizer([("weight", weight)], name=name, **{**SETTINGS, "lr": 0.05, "weight_decay": 0.0})
        losses[name] = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = (curvature * (weight - target) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert isinstance(optimizer, bnb.optim.AdamW8bit)
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert losses["adamw"][-1] < 0.2 * losses["adamw"][0]
    assert losses["adam8bit"] == pytest.approx(losses["adamw"], rel=0.1, abs=0.01 * losses["adamw"][0])


def test_eight_bit_groups_and_learning_rate() -> None:
    pytest.importorskip("bitsandbytes")
    optimizer = make_optimizer(Block().named_parameters(), name="adam8bit", **SETTINGS)
    set_learning_rate(optimizer, 0.5)
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [
        (0.5, 0.1, (0.9, 0.95)),
        (0.5, 0.0, (0.9, 0.95)),
    ]


def storages(value: Any) -> dict[int, int]:
    """Bytes of every storage of a state, by its address."""
    if isinstance(value, dict):
        return {address: size for each in value.values() for address, size in storages(each).items()}
    if isinstance(value, torch.Tensor) and value.numel():
        return {value.data_ptr(): value.untyped_storage().nbytes()}
    return {}


@pytest.mark.parametrize("shape", [(1,), (10,), (4095,), (4096,), (4097,), (4224,), (64, 72), (5, 1000), (127, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALONE)
def test_state_has_the_declared_bytes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Below and above the size from which states are quantized, and where blocks do not come out even. What several
    parameters share counts once."""
    shapes = [shape, (4096,), (4096,), (64, 80)]
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = build(name, [(f"{i}.weight", parameter) for i, parameter in enumerate(parameters)])
    set_gradients(parameters, 1)
    optimizer.step()
    everything = {key: size for state in optimizer.state.values() for key, size in storages(state).items()}
    infos = [ParamInfo(f"{i}.weight", tuple(p.shape), p.element_size(), "projection") for i, p in enumerate(parameters)]
    options = make_options(name)
    assert sum(everything.values()) == state_bytes(options, infos)


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_own_adamw_is_taken_only_where_torchs_cannot(stochastic_rounding: bool) -> None:
    optimizer = build("adamw", Block(torch.bfloat16).named_parameters(), stochastic_rounding=stochastic_rounding)
    assert isinstance(optimizer, torch.optim.AdamW) != stochastic_rounding
    assert type(optimizer).__name__ == "AdamW", "the name in a checkpoint"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_float32_moments_of_bfloat16_weights_are_those_of_float32_weights() -> None:
    """Beside torch's AdamW on float32 weights with the same gradients; and what bfloat16 moments make of noise of
    constant size, the 1.44 of the start-up note."""
    shape, noise = (64, 64), torch.Generator().manual_seed(0)
    narrow, wide, exact = (nn.Parameter(torch.ones(shape, dtype=d)) for d in (torch.bfloat16, *[torch.float32] * 2))
    settings = {**SETTINGS, "betas": [0.9, 0.999], "weight_decay": 0.0, "lr": 1e-4}
    plain = make_optimizer([("w", narrow)], name="adamw", **settings)
    narrow_too = nn.Parameter(narrow.detach().clone())
    kept = make_optimizer([("w", narrow_too)], name="adamw", moments_dtype="float32", **settings)
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(4000):
        gradient = torch.randn(shape, generator=noise).bfloat16()
        for parameter, optimizer in ((narrow, plain), (narrow_too, kept), (exact, reference)):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert isinstance(plain, torch.optim.AdamW) and not isinstance(kept, torch.optim.AdamW)
    for key in ("exp_avg", "exp_avg_sq"):
        assert kept.state[narrow_too][key].dtype == torch.float32
        torch.testing.assert_close(kept.state[narrow_too][key], reference.state[exact][key], rtol=1e-4, atol=1e-6)
    true = reference.state[exact]["exp_avg_sq"].mean()
    assert plain.state[narrow]["exp_avg_sq"].float().mean() / true == pytest.approx(1.44, abs=0.05)
    assert sum(v.nbytes for v in kept.state[narrow_too].values()) == kept_bytes(4096, 2, "float32")
    assert isinstance(
        make_optimizer([("w", wide)], name="adamw", moments_dtype="float32", **settings), torch.optim.AdamW
    )


def kept_bytes(numel: int, element_size: int, moments_dtype: str) -> int:
    return make_options("adamw", moments_dtype=moments_dtype).state_bytes(
        ParamInfo("w", (numel,), element_size, "projection")
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"grad_clip": 1.0, "per_layer_update": True},
            "grad_clip=1.0 needs all .* grad_clip=null, and .* grad_clip_per_parameter=1.0 too",
        ),
        ({"stochastic_rounding": True}, "they are float32; set dtype=bfloat16"),
    ],
)
def test_updates_that_do_not_go_together_are_refused(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_updates(dtype=torch.float32, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [{"grad_clip": 1.0}, {"per_layer_update": True, "stochastic_rounding": True}])
def test_updates_that_go_together(how: dict[str, Any]) -> None:
    check_updates(dtype=torch.bfloat16, **how)


def test_mistakes_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="optimizer=adma does not exist; there are: adafactor, adam8bit, adamw"):
        make_optimizer(Block().named_parameters(), name="adma", **SETTINGS)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer([], name="adamw", **SETTINGS)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs bitsandbytes.*pip install bitsandbytes.*optimizer=adamw"):
        make_optimizer(Block().named_parameters(), name="adam8bit", **SETTINGS)


# ---- an optimizer that needs whole matrices, and leaves the rest to another


class ColumnNormalised(torch.optim.Optimizer):
    """w <- w - lr g / |g|, column by column; "step" counts updates."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    norms = parameter.grad.norm(dim=0, keepdim=True)
                    parameter.sub_(parameter.grad / norms, alpha=group["lr"])


class MatrixOptions(OptimizerConfig):
    """Takes matrices with elements; AdamW gets the rest."""

    def takes(self, parameter: ParamInfo) -> bool:
        return len(parameter.shape) == 2 and parameter.numel > 0

    def make(self, groups: Any, lr: float, device: torch.device) -> torch.optim.Optimizer:
        return ColumnNormalised(groups, lr)

    def state_bytes(self, parameter: ParamInfo) -> int:
        return 0


def build_matrix(block: Block, **how: Any) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "device": CPU, **how}
    return build_optimizer(block.named_parameters(), MatrixOptions(name="matrix"), **settings)


def expected_after(block: Block, steps: int) -> dict[str, torch.Tensor]:
    """What the two optimizers do to their parameters, each by itself."""
    named = [(name, p) for name, p in block.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim == 2 and p.numel()]
    rest = [(name, p) for name, p in named if not (p.ndim == 2 and p.numel())]
    optimizers = [
        ColumnNormalised([p for _, p in matrices], 1e-2),
        make_optimizer(rest, name="adamw", lr=1e-2, weight_decay=0.1, device=CPU),
    ]
    for step in range(steps):
        set_gradients([p for _, p in named], step)
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in block.named_parameters()}


@pytest.mark.parametrize("per_layer", [False, True])
def test_each_parameter_has_the_optimizer_that_takes_it(per_layer: bool) -> None:
    block = Block()
    optimizer = build_matrix(block)
    assert isinstance(optimizer, Composite)
    assert [[group["param_names"] for group in member.param_groups] for member in optimizer.members] == [
        [["q_proj.weight"]],
        [
            ["values", "A"],
            ["q_proj.bias", *(f"{norm}.{leaf}" for norm in ("input_layernorm", "norm") for leaf in ("weight", "bias"))],
        ],
    ]
    if per_layer:
        optimizer = PerLayerUpdate(optimizer, parameters=block.parameters())
    for step in range(3):
        set_gradients([p for p in block.parameters() if p.requires_grad], step)
        optimizer.step()
    expected = expected_after(Block(), 3)
    assert all(torch.equal(p, expected[name]) for name, p in block.named_parameters())


def test_a_matrix_is_never_cut_and_rounds_as_a_whole() -> None:
    block = Block(torch.bfloat16)
    optimizer = build_matrix(block, stochastic_rounding=True)
    before = block.q_proj.weight.detach().clone()
    set_gradients([p for p in block.parameters() if p.requires_grad], 0)
    gradient = block.q_proj.weight.grad.float()
    optimizer.step()
    exact = before.float() - 1e-2 * gradient / gradient.norm(dim=0, keepdim=True)
    spacing = exact.abs() * 2**-7
    assert ((block.q_proj.weight.float() - exact).abs() <= spacing).all()
    infos = [ParamInfo("w", (3000, 3000), 2, "projection")]
    assert step_bytes(MatrixOptions(name="matrix"), infos, "cpu", True) == 2 * 4 * 3000 * 3000


def test_the_state_of_several_optimizers_is_kept_by_name() -> None:
    first, second, straight = Block(), Block(), Block()
    optimizer, later, reference = build_matrix(first), build_matrix(second), build_matrix(straight)
    for step in range(4):
        for block, member in ((first, optimizer), (straight, reference)):
            set_gradients([p for p in block.parameters() if p.requires_grad], step)
            if step < 2 or block is straight:
                member.step()
    saved = named_state(optimizer)
    assert saved["class"] == "ColumnNormalised + AdamW" and saved["state"]["q_proj.weight"] == {"step": 2}
    second.load_state_dict(first.state_dict())
    load_named_state(later, saved)
    for step in (2, 3):
        set_gradients([p for p in second.parameters() if p.requires_grad], step)
        later.step()
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), straight.parameters(), strict=True))


def test_an_optimizer_that_takes_nothing_leaves_all_to_the_next() -> None:
    """As in a phase before its matrices join; a run whose last phase has none is refused by `check_takes`."""
    options = MatrixOptions(name="matrix")
    optimizer = build_optimizer(
        [("norm.weight", nn.Parameter(torch.ones(3)))], options, lr=1, weight_decay=0, device=CPU
    )
    assert named_state(optimizer)["class"] == "AdamW"
    with pytest.raises(ValueError, match="optimizer=matrix takes none of the model's parameters"):
        check_takes(options, [ParamInfo("norm.weight", (3,), 4, "gain")])


def test_single_parameters_may_have_a_learning_rate_and_a_decay_of_their_own() -> None:
    def options(parameter: ParamInfo) -> dict[str, float]:
        return (
            {"lr_scale": 0.5} if parameter.name == "values" else {"weight_decay": 0.0} if parameter.name == "A" else {}
        )

    optimizer = make_optimizer(Block().named_parameters(), name="adamw", group_options=options, **SETTINGS)
    set_learning_rate(optimizer, 0.4)
    groups = {tuple(group["param_names"]): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert (
        groups[("values",)] == (0.2, 0.1) and groups[("A",)] == (0.4, 0.0) and groups[("q_proj.weight",)] == (0.4, 0.1)
    )
    assert sum(map(len, groups)) == 8


@pytest.mark.parametrize("frozen", ["matrices", "rest"])
def test_a_phase_may_leave_one_of_several_optimizers_without_parameters(frozen: str) -> None:
    block = Block()
    optimizer = build_matrix(block)
    set_gradients([p for p in block.parameters() if p.requires_grad], 0)
    optimizer.step()
    for parameter in block.parameters():
        is_matrix = parameter.ndim == 2 and parameter.numel() > 0
        parameter.grad = None
        parameter.requires_grad_(parameter.requires_grad and is_matrix == (frozen == "rest"))
    rebuilt = rebuild_optimizer(optimizer, lambda: build_matrix(block))
    if frozen == "matrices":
        assert named_state(rebuilt)["class"] == "AdamW"
        assert {state["step"].item() for state in named_state(rebuilt)["state"].values()} == {1}
        return
    assert named_state(rebuilt)["class"] == "ColumnNormalised"
    assert named_state(rebuilt)["state"] == {"q_proj.weight": {"step": 1}}
    set_gradients([block.q_proj.weight], 1)
    rebuilt.step()
    assert named_state(rebuilt)["state"] == {"q_proj.weight": {"step": 2}}
