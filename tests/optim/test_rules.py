"""Optimizers of one rule a tensor, 20 updates each, against their formulas written down again in float64 and, where the
package is there, against their authors' code."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import make_optimizer, make_options
from torch import Tensor, nn

from sltrain.affine import decode as decode_few
from sltrain.affine import encode as encode_few
from sltrain.compose import TRAIN, compose_config
from sltrain.config_checks import validate
from sltrain.engine.memory import tensor_peak
from sltrain.optim import build
from sltrain.optim.basis import leading_directions, normal, sketched_directions
from sltrain.optim.blockwise import decode, encode, new_codes
from sltrain.optim.build import build_optimizer, state_bytes
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.named_state import load_named_state, named_state
from sltrain.optim.orthogonal import newton_schulz, qdwh
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.parameters import ParamInfo

CPU = torch.device("cpu")
SHAPES = [(20, 12), (12, 20), (16, 16)]
LR, DECAY, UPDATES = 0.02, 0.1, 20
PROJECTED = {"rank": 4, "update_every": 6}


def gradients(shape: tuple[int, int]) -> Iterator[Tensor]:
    """Of a quadratic that is steeper in some directions, with noise: sizes differ and shrink."""
    generator = torch.Generator().manual_seed(shape[0])
    curvature = torch.logspace(0, 2, shape[1])
    for _ in range(UPDATES):
        yield torch.randn(shape, generator=generator) * curvature


def ours(name: str, shape: tuple[int, int], **options: Any) -> Tensor:
    weight = nn.Parameter(torch.ones(shape))
    kept = make_options(name, **options)
    optimizer = build_optimizer([("q_proj.weight", weight)], kept, lr=LR, weight_decay=DECAY, device=CPU)
    for gradient in gradients(shape):
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


def rewritten(shape: tuple[int, int], direction: Callable[[Tensor, int, dict[str, Any]], Tensor]) -> Tensor:
    """Decoupled weight decay and lr x direction, in float64."""
    weight, state = torch.ones(shape, dtype=torch.float64), {}
    for step, gradient in enumerate(gradients(shape), start=1):
        weight = weight * (1 - LR * DECAY) - LR * direction(gradient.double(), step, state)
    return weight


def lion(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    m = state.get("m", torch.zeros_like(g))
    state["m"] = 0.99 * m + 0.01 * g
    return torch.sign(0.9 * m + 0.1 * g)


def sgd(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    state["m"] = 0.9 * state.get("m", 0) + g
    return g + 0.9 * state["m"]


def scale(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    return torch.stack([row / math.sqrt(sum(x * x for x in row.tolist()) / len(row)) for row in g])


def muon(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    state["m"] = 0.95 * state.get("m", 0) + g
    x = g + 0.95 * state["m"]
    x = x / x.norm()
    for _ in range(5):  # through the singular values, which the iteration maps one by one
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        x = u @ torch.diag(3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ v
    return 0.2 * math.sqrt(max(g.shape)) * x


def polargrad(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    state["m"] = 0.95 * state.get("m", 0) + 0.05 * g
    u, s, v = torch.linalg.svd(state["m"], full_matrices=False)
    return s.sum() * u @ v


def adam_of(low: Tensor, step: int, state: dict[str, Any]) -> tuple[Tensor, float]:
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * low
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * low**2
    n = state["m"] / (state["v"].sqrt() + 1e-8)
    if state.get("in_codes"):
        state["m"], state["v"] = eight_bits(state["m"], signed=True), eight_bits(state["v"], signed=False)
    return n, math.sqrt(1 - 0.999**step) / (1 - 0.9**step)


def projector(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    """(out, out) or (in, in): P P^T, which does not depend on signs or on a rotation of P. Here P itself is needed for
    the moments, so signs are those of `leading_directions`."""
    if (step - 1) % 6 == 0:
        state["P"] = leading_directions(g.float(), 4).double()
    return state["P"]


def galore(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    p, tall = projector(g, step, state), g.shape[0] >= g.shape[1]
    n, c = adam_of(g @ p if tall else p.T @ g, step, state)
    return 0.25 * c * (n @ p.T if tall else p @ n)


def in_groups(x: Tensor, of_group: Callable[[list[float]], list[float]]) -> Tensor:
    """Each 256 entries in row-major order, changed by `of_group`."""
    flat = x.flatten().tolist()
    changed = [value for i in range(0, len(flat), 256) for value in of_group(flat[i : i + 256])]
    return torch.tensor(changed, dtype=torch.float64).view(x.shape)


def four_bits(group: list[float]) -> list[float]:
    """The nearest multiples of a step, of 16 that begin with the least."""
    step = (max(*group, 0) - min(*group, 0)) / 15
    zero = round(-min(*group, 0) / step)
    return [step * (min(max(round(x / step) + zero, 0), 15) - zero) for x in group]


def dynamic_values(signed: bool) -> list[float]:
    """0, 1 and the middles of equal parts of [0.1, 1] x 10^-e, twice as many with each power of ten (Dettmers, arXiv
    1511.04561), of both signs if `signed`."""
    found = [0.0, 1.0]
    for e in range(7):
        parts = 2 ** (6 - e) * (1 if signed else 2)
        middles = [10.0**-e * (0.1 + 0.9 * (k + 0.5) / parts) for k in range(parts)]
        found += middles + ([-x for x in middles] if signed else [])
    assert len(found) == 256
    return sorted(found)


def eight_bits(x: Tensor, signed: bool) -> Tensor:
    values = dynamic_values(signed)

    def of_block(block: list[float]) -> list[float]:
        largest = max(map(abs, block))
        return [largest * min(values, key=lambda value: abs(value - x / largest)) for x in block]

    return in_groups(x, of_block)


def q_galore(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    """Renewed at first every second update, similarities over two renewals."""
    tall = g.shape[0] >= g.shape[1]
    interval, alike = state.setdefault("interval", 2), state.setdefault("alike", [])
    if (step - 1) % interval == 0:
        p = leading_directions(g.float(), 4).double()
        if "P" in state:
            alike.append(abs(torch.nn.functional.cosine_similarity(p[:, 0], state["P"][:, 0], dim=0).item()))
            state["interval"] = interval * (1 + (len(alike) > 1 and sum(alike[-2:]) / 2 >= 0.4))
        state["P"] = in_groups(p.T, four_bits).T
    low = g @ state["P"] if tall else state["P"].T @ g
    m, v = 0.9 * state.get("m", 0) + 0.1 * low, 0.999 * state.get("v", 0) + 0.001 * low**2
    n = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    state["m"], state["v"] = eight_bits(m, signed=True), eight_bits(v, signed=False)
    return 0.25 * (n @ state["P"].T if tall else state["P"] @ n)


def limited(x: Tensor, state: dict[str, Any]) -> Tensor:
    if "norm" in state and x.norm() > 1.01 * state["norm"]:
        x = x * 1.01 * state["norm"] / x.norm()
    state["norm"] = x.norm()
    return x


def fira(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    p, tall = projector(g, step, state), g.shape[0] >= g.shape[1]
    low = g @ p if tall else p.T @ g
    n, c = adam_of(low, step, state)
    phi = n.norm(dim=int(tall), keepdim=True) / low.norm(dim=int(tall), keepdim=True)
    back = (lambda x: x @ p.T) if tall else (lambda x: p @ x)
    return c * (0.25 * back(n) + limited((g - 0.25 * back(low)) * phi, state))


def apollo(g: Tensor, step: int, state: dict[str, Any], rank: int = 4, whole: bool = False, size: float = 1) -> Tensor:
    if (step - 1) % 6 == 0:
        state["P"] = normal((min(g.shape), rank), (step - 1) // 6, CPU).double() / math.sqrt(rank)
    p, tall = state["P"], g.shape[0] >= g.shape[1]
    low = g @ p if tall else p.T @ g
    n, c = adam_of(low, step, state)
    dims = {} if whole else {"dim": int(tall), "keepdim": True}
    return c * math.sqrt(size) * limited(g * n.norm(**dims) / low.norm(**dims), state)


def apollo_mini(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    return apollo(g, step, state, rank=1, whole=True, size=128)


def cosine_basis(d: int) -> Tensor:
    """(d, d), column k the k-th vector."""
    q = torch.tensor([[math.cos(math.pi * (j + 0.5) * k / d) for k in range(d)] for j in range(d)], dtype=torch.float64)
    return q / q.norm(dim=0)


def dct_adamw(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    """On the shorter side as columns; moments turned by the product of the two bases."""
    tall = g.shape[0] >= g.shape[1]
    g = g if tall else g.T
    q = cosine_basis(g.shape[1])
    new = q[:, (g @ q).abs().sum(0).topk(4).indices]
    turn = state.get("q", new).T @ new
    state["q"] = new
    low = g @ new
    state["m"] = 0.9 * (state.get("m", torch.zeros_like(low)) @ turn) + 0.1 * low
    state["v"] = 0.999 * (state.get("v", torch.zeros_like(low)) @ turn).abs() + 0.001 * low**2
    c = math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    out = c * state["m"] / (state["v"].abs().sqrt() + 1e-8) @ new.T
    return out if tall else out.T


def trion(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
    shape, tall = g.shape, g.shape[0] >= g.shape[1]
    g = g if tall else g.T
    q = cosine_basis(g.shape[1])
    momentum = state.get("M", 0) + g
    new = q[:, (momentum @ q).abs().sum(0).topk(4).indices]
    low = momentum @ new
    state["M"] = momentum - 0.05 * low @ new.T
    x = low / low.norm()
    for _ in range(5):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        x = u @ torch.diag(3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ v
    out = 0.2 * math.sqrt(max(shape)) * x @ new.T
    return out if tall else out.T


RULES: dict[str, tuple[Callable, dict[str, Any]]] = {
    "lion": (lion, {}),
    "sgd": (sgd, {"momentum": 0.9, "nesterov": True}),
    "scale": (scale, {}),
    "muon": (muon, {}),
    "polargrad": (polargrad, {}),
    "galore": (galore, PROJECTED),
    "q_galore": (q_galore, {"rank": 4, "update_every": 2, "queue": 2}),
    "fira": (fira, PROJECTED),
    "apollo": (apollo, PROJECTED),
    "dct_adamw": (dct_adamw, {"rank": 4, "error_feedback": False}),
    "trion": (trion, {"rank": 4}),
    "apollo_mini": (apollo_mini, {"update_every": 6}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_twenty_updates_are_the_formulas(name: str, shape: tuple[int, int]) -> None:
    rule, options = RULES[name]
    torch.testing.assert_close(ours(name, shape, **options).double(), rewritten(shape, rule), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo_mini"])
def test_with_moments_in_codes_twenty_updates_are_the_formulas(name: str, shape: tuple[int, int]) -> None:
    rule, options = RULES[name]

    def in_codes(g: Tensor, step: int, state: dict[str, Any]) -> Tensor:
        state["in_codes"] = True
        return rule(g, step, state)

    coarse, exact = ours(name, shape, moments_dtype="8bit", **options), ours(name, shape, **options)
    torch.testing.assert_close(coarse.double(), rewritten(shape, in_codes), rtol=2e-4, atol=2e-4)
    assert 1e-4 < (coarse - exact).norm() / (exact - 1).norm() < 0.2


def authors_galore() -> Any:
    return pytest.importorskip("galore_torch").GaLoreAdamW


def authors_fira() -> Any:
    return pytest.importorskip("fira").FiraAdamW


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "load", "size"), [("galore", authors_galore, "scale"), ("fira", authors_fira, "alpha")]
)
def test_twenty_updates_are_the_authors_code(name: str, load: Callable, size: str, shape: tuple[int, int]) -> None:
    """Their packages are installed by hand (galore-torch 1.0, fira 1.0.2)."""
    theirs = nn.Parameter(torch.ones(shape))
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 6, size: 0.25, "proj_type": "std"}
    optimizer = load()([group], lr=LR, eps=1e-8, no_deprecation_warning=True)
    for gradient in gradients(shape):
        theirs.grad = gradient
        optimizer.step()
    weight = nn.Parameter(torch.ones(shape))
    own = make_optimizer([("q_proj.weight", weight)], name=name, lr=LR, weight_decay=0.0, device=CPU, **{})
    own.rule.update_every = 6  # type: ignore[attr-defined]
    for gradient in gradients(shape):
        weight.grad = gradient
        own.step()
    torch.testing.assert_close(weight, theirs, rtol=2e-4, atol=2e-4)


def test_muon_is_torchs() -> None:
    """torch iterates in bfloat16."""
    weight = nn.Parameter(torch.ones(20, 12))
    theirs = torch.optim.Muon([weight], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients((20, 12)):
        weight.grad = gradient
        theirs.step()
    difference = ours("muon", (20, 12)) - weight.detach()
    assert difference.norm() < 0.02 * (1 - weight.detach()).norm()


def test_eight_bit_momentum_follows_the_exact_one() -> None:
    exact, coarse = (ours("muon", (20, 12), momentum_dtype=dtype) for dtype in ("auto", "int8"))
    assert (exact - coarse).norm() < 0.2 * (exact - 1).norm()
    weight = torch.zeros(20, 13)
    state, values = new_codes(weight), torch.randn(20, 13, generator=torch.Generator().manual_seed(0))
    encode(values, state)
    assert state["codes"].dtype == torch.int8 and len(state["scales"]) == 2
    assert (decode(state) - values).abs().max() <= 0.5 * values.abs().max() / 127 + 1e-6
    info = ParamInfo("q_proj.weight", (20, 13), 4, "projection")
    assert make_options("muon", momentum_dtype="int8").state_bytes(info) == 260 + 8


def test_error_feedback_adds_what_was_left_out_to_the_next_gradient() -> None:
    options = make_options("dct_adamw", rank=4)
    weight, gradient = torch.zeros(20, 12), torch.randn(20, 12, generator=torch.Generator().manual_seed(7))
    state = {"step": 1, **options.new_state(weight)}
    options.direction(gradient, state)
    q = cosine_basis(12).float()[:, state["numbers"].long()]
    torch.testing.assert_close(decode(state), gradient - gradient @ q @ q.T, atol=0.02, rtol=0)
    state["step"] = 2
    before = decode(state)
    options.direction(torch.zeros(20, 12), state)
    chosen = (before @ cosine_basis(12).float()).abs().sum(0).topk(4).indices.sort().values
    assert torch.equal(state["numbers"].long(), chosen)


@pytest.mark.parametrize("shape", [*SHAPES, (30, 4)])
def test_polar_factors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(qdwh(matrix), left @ right, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert values.min() > 0.3 and values.max() < 1.3
    assert not qdwh(torch.zeros(shape)).isnan().any() and not newton_schulz(torch.zeros(shape)).isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sketch_finds_the_leading_directions(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(side, 12, generator=generator))[0] for side in shape)
    matrix = left @ torch.diag(torch.tensor([9.0, 7.0, 5.0, 3.0] + [0.1] * 8)) @ right.T
    exact, sketched = leading_directions(matrix, 4), sketched_directions(matrix, 4, 0)
    torch.testing.assert_close(sketched @ sketched.T, exact @ exact.T, rtol=1e-3, atol=1e-3)


def test_scale_treats_each_role_by_its_rule() -> None:
    """Embeddings over the vocabulary, S as a whole, a momentum for the head alone, AdamW for gains."""
    shapes = {"embedding": (30, 8), "projection": (8, 8), "values": (20,), "head": (30, 8), "gain": (8,)}
    infos = {f"{role}.w": ParamInfo(f"{role}.w", shape, 4, role) for role, shape in shapes.items()}
    weights = {name: nn.Parameter(torch.zeros(info.shape)) for name, info in infos.items()}
    options = make_options("scale")
    optimizer = build_optimizer(weights.items(), options, lr=1.0, weight_decay=0.0, device=CPU, infos=infos)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    moved = {name.partition(".")[0]: weight.detach().square() for name, weight in weights.items()}
    ones = {"embedding": moved["embedding"].mean(0), "values": moved["values"].mean()[None]}
    ones |= {role: moved[role].mean(1) for role in ("projection", "head")}
    for role, means in ones.items():
        torch.testing.assert_close(means, torch.ones_like(means), msg=role)
    assert state_bytes(options, infos.values()) == 4 * 240 + (2 * 4 * 8 + 4)
    assert {key for kept in optimizer.state.values() for key in kept} == {"step", "momentum", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("name", "how"), [*((name, {}) for name in RULES), ("galore", {"moments_dtype": "8bit"})])
def test_inside_backward_it_is_the_ordinary_update(name: str, how: dict[str, Any]) -> None:
    def trained(inside: bool) -> Tensor:
        model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False))
        generator = torch.Generator().manual_seed(4)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1, generator=generator)
        settings = {"lr": 0.01, "weight_decay": 0.1, "device": CPU, **how}
        optimizer = make_optimizer(model.named_parameters(), name=name, **settings)
        optimizer = PerLayerUpdate(optimizer) if inside else optimizer
        for _ in range(4):
            loss = model(torch.randn(6, 12, generator=generator)).square().sum()
            if isinstance(optimizer, PerLayerUpdate):
                optimizer.before_backward(is_last=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    assert torch.equal(trained(False), trained(True))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lion", {"betas": [0.9]}, "optimizer.betas=.* two numbers"),
        ("lion", {"betas": [1.0, 1.0]}, "optimizer.betas=.* two numbers from 0 to below 1"),
        ("fira", {"scale": math.nan}, "optimizer.scale=nan: must be a number above 0"),
        ("apollo", {"scale": math.inf}, "optimizer.scale=inf: must be a number above 0"),
        ("adafactor", {"clip": math.inf}, "must be a number of at least 1"),
        ("sgd", {"nesterov": True}, "optimizer.nesterov=true needs a momentum"),
        ("sgd", {"momentum": 1.0}, "optimizer.momentum=1.0: must be from 0 to below 1"),
        ("muon", {"scale": "adam"}, "optimizer.scale=adam: choose one of match_rms, original"),
        ("muon", {"momentum_dtype": "int4"}, "choose one of auto, int8"),
        ("muon", {"others": "lion"}, "optimizer.others=lion: choose one of adamw, adam8bit, scale"),
        ("galore", {"rank": 0}, "optimizer.rank=0: must be at least 1"),
        ("galore", {"svd": "fast"}, "choose one of exact, randomized"),
        ("galore", {"moments_dtype": "int8"}, "optimizer.moments_dtype=int8: choose one of auto, float32, 8bit"),
        ("q_galore", {"queue": 0}, "optimizer.queue=0: must be at least 1"),
        ("q_galore", {"threshold": 0.0}, "optimizer.threshold=0.0: must be a number above 0"),
        ("apollo", {"per": "row"}, "choose one of channel, tensor"),
        ("adafactor", {"beta2_decay": 0.8}, "must be from -1 to below 0"),
    ],
)
def test_impossible_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make_options(name, **options).check()
    assert "\n" not in str(caught.value)


# ---- rules for A and B together


def factored() -> nn.Module:
    """One layer's A (4, 12) and B (20, 4), B zero at the start."""
    layer = nn.Module()
    layer.A = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(5)))
    layer.B = nn.Parameter(torch.zeros(20, 4))
    return layer


INFOS = {name: ParamInfo(name, shape, 4, "factor") for name, shape in {"A": (4, 12), "B": (20, 4)}.items()}
TARGET = torch.randn(20, 12, generator=torch.Generator().manual_seed(6))


def pair_optimizer(name: str, layer: nn.Module) -> torch.optim.Optimizer:
    named = [(f"up.{leaf}", weight) for leaf, weight in layer.named_parameters()]
    infos = {leaf: ParamInfo(leaf, tuple(weight.shape), 4, "factor") for leaf, weight in named}
    return build_optimizer(named, make_options(name), lr=LR, weight_decay=DECAY, device=CPU, infos=infos)


def follow(layer: nn.Module, optimizer: torch.optim.Optimizer, updates: int = UPDATES) -> None:
    for _ in range(updates):
        optimizer.zero_grad()
        (layer.B @ layer.A - TARGET).square().sum().backward()
        optimizer.step()


def spectron_pair(step: int, weights: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Any]) -> dict:
    """Singular values by ten steps of power iteration would differ: one step an update is part of the method."""
    sigmas, directions = {}, {}
    for key, w in weights.items():
        start = normal((len(w),), 0, CPU).double()
        left = state.get(f"u{key}", start / start.norm())
        right = w.T @ left
        moved = w @ right / right.norm() if right.norm() > 0 else 0 * left
        sigmas[key] = moved.norm()
        state[f"u{key}"] = moved / moved.norm() if moved.norm() > 0 else left
        state[key] = 0.95 * state.get(key, 0) + 0.05 * grads[key]
        x = state[key] / state[key].norm().clamp_min(1e-7)
        for _ in range(5):
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            x = u @ torch.diag(3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ v
        directions[key] = x
    return {key: x / (sigmas["A"] + sigmas["B"] + 1) for key, x in directions.items()}


def scaled_pair(step: int, weights: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Any]) -> dict:
    a, b, eye = weights["A"], weights["B"], torch.eye(4, dtype=torch.float64)

    def precondition(gram: Tensor) -> Tensor:
        t = torch.linalg.eigvalsh(gram).mean()
        return eye / (1 + 1e-6) if gram.abs().max() == 0 else t * torch.linalg.inv(gram + 1e-6 * t * eye)

    scaled = {"A": precondition(b.T @ b) @ grads["A"], "B": grads["B"] @ precondition(a @ a.T)}
    directions = {}
    for key, g in scaled.items():
        state[f"m{key}"] = 0.9 * state.get(f"m{key}", 0) + 0.1 * g
        state[f"v{key}"] = 0.999 * state.get(f"v{key}", 0) + 0.001 * g**2
        mean, squares = state[f"m{key}"] / (1 - 0.9**step), state[f"v{key}"] / (1 - 0.999**step)
        directions[key] = mean / (squares.sqrt() + 1e-8)
    return directions


@pytest.mark.parametrize(("name", "rule"), [("spectron", spectron_pair), ("scaled_adamw", scaled_pair)])
def test_twenty_updates_of_a_pair_are_the_formulas(name: str, rule: Callable) -> None:
    layer = factored()
    follow(layer, pair_optimizer(name, layer))
    weights = {key: weight.detach().double() for key, weight in factored().named_parameters()}
    state: dict[str, Any] = {}
    for step in range(1, UPDATES + 1):
        a, b = weights["A"], weights["B"]
        error = 2 * (b @ a - TARGET.double())
        directions = rule(step, weights, {"A": b.T @ error, "B": error @ a.T}, state)
        weights = {key: w * (1 - LR * DECAY) - LR * directions[key] for key, w in weights.items()}
    for key, weight in layer.named_parameters():
        torch.testing.assert_close(weight.detach().double(), weights[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["spectron", "scaled_adamw"])
def test_a_pair_resumes_bit_for_bit_and_has_the_declared_state(name: str) -> None:
    straight, stopped = factored(), factored()
    optimizer = pair_optimizer(name, straight)
    follow(straight, optimizer, 7)
    first = pair_optimizer(name, stopped)
    follow(stopped, first, 4)
    second = pair_optimizer(name, stopped)
    load_named_state(second, named_state(first))
    follow(stopped, second, 3)
    assert torch.equal(straight.A, stopped.A) and torch.equal(straight.B, stopped.B)
    kept = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    options = make_options(name)
    assert kept == sum(options.state_bytes(ParamInfo(f"up.{k}", v.shape, 4, "factor")) for k, v in INFOS.items())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_the_page_on_optimizers_has_its_section(name: str) -> None:
    page = Path(build.__file__).with_name("README.md").read_text()
    assert f"\n## `{name}`\n" in page and f"`{name}" in page.partition("\n## ")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_step_takes_no_more_memory_than_declared(name: str, dtype: torch.dtype) -> None:
    """Measured, of a square matrix, where Gram matrices are as large as the weight."""
    kind = OPTIMIZERS.load(name)
    if kind.package is not None:
        pytest.importorskip(kind.package)
    shapes = {"up.A": (128, 384), "up.B": (384, 128)} if kind.whole_update else {"up.weight": (256, 256)}
    weights = {key: nn.Parameter(torch.ones(shape, dtype=dtype)) for key, shape in shapes.items()}
    infos = {key: ParamInfo(key, tuple(w.shape), w.element_size(), "factor") for key, w in weights.items()}
    options = make_options(name)
    optimizer = build_optimizer(weights.items(), options, lr=0.01, weight_decay=0.0, device=CPU, infos=infos)
    generator = torch.Generator().manual_seed(8)
    for _ in range(2):  # the first update makes the state
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        _, peak = tensor_peak(optimizer.step, 0, CPU)
    assert peak <= 1.02 * build.step_bytes(options, infos.values(), "cpu") + 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "too_much"), [("q_galore", 0.02), ("galore", 0.07)])  # galore's basis may be float32
def test_moments_in_codes_take_the_declared_memory(name: str, too_much: float, dtype: torch.dtype) -> None:
    """At a rank at which they, and not the decomposition, need most."""
    options = make_options(name, rank=190, update_every=1, moments_dtype="8bit")
    weight = nn.Parameter(torch.ones(512, 200, dtype=dtype))
    info = ParamInfo("up.weight", (512, 200), weight.element_size(), "factor")
    optimizer = build_optimizer([("up.weight", weight)], options, lr=0.01, weight_decay=0.0, device=CPU)
    for _ in range(2):
        weight.grad = torch.randn(512, 200, generator=torch.Generator().manual_seed(10)).to(dtype)
        _, peak = tensor_peak(optimizer.step, 0, CPU)
    assert 1 / 1.02 <= options.step_bytes(info, "cpu", rounding=False) / peak <= 1 + too_much


@pytest.mark.parametrize(("name", "error"), [("galore", 1e-4), ("q_galore", 0.1)])
def test_a_basis_waits_for_a_gradient(name: str, error: float) -> None:
    """That of A is zero while B is zero."""
    options: Any = make_options(name, rank=4)
    weight = torch.zeros(20, 12)
    state: dict[str, Any] = {"step": 0, **options.new_state(weight)}
    for step, gradient in enumerate([torch.zeros(20, 12), *list(gradients((20, 12)))[:2]], start=1):
        state["step"] = step
        options.direction(gradient, state)
    expected = leading_directions(next(gradients((20, 12))), 4)
    basis = state["basis"] if name == "galore" else options._basis(state, 12)
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=error, atol=error)


def test_a_basis_that_hardly_moves_is_renewed_ever_more_seldom() -> None:
    """Every gradient leads in one direction, or each in a new one. 5 renewals after the first fill the queue."""
    source = torch.Generator().manual_seed(9)
    one = torch.outer(torch.randn(20, generator=source), torch.randn(12, generator=source))
    chosen: dict[str, list[int]] = {}
    for name in ("one", "new"):
        options, weight = make_options("q_galore", rank=1, update_every=3), torch.zeros(20, 12)
        state: dict[str, Any] = {"step": 0, **options.new_state(weight)}
        chosen[name] = []
        for step in range(1, 61):
            state["step"], before = step, state["basis_codes"].clone()
            noise = torch.randn(20, 12, generator=source)
            options.direction(10 * one * (-1) ** step + noise if name == "one" else noise, state)
            chosen[name] += [] if torch.equal(before, state["basis_codes"]) else [step]
    assert chosen["one"] == [1, 4, 7, 10, 13, 16, 19, 25, 49]  # multiples of 3, 6, 12 and 24, from 0, from 16 on
    assert chosen["new"] == list(range(1, 61, 3))


FEW_BITS = 4 * 12 // 2 + (4 + 1) + 4 * 2  # codes, step and zero of a basis; two similarities
IN_CODES = 2 * 20 * 4 + 2 * 4  # of two moments, a scale each


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("q_galore", {"queue": 2}, FEW_BITS + IN_CODES),
        ("q_galore", {"queue": 2, "moments_dtype": "float32"}, FEW_BITS + 4 * 2 * 20 * 4),
        ("galore", {"moments_dtype": "8bit"}, 4 * 4 * 12 + IN_CODES),
        ("fira", {"moments_dtype": "8bit"}, 4 * 4 * 12 + IN_CODES + 4),  # and the norm that may not grow
        ("apollo", {"moments_dtype": "8bit"}, 4 * 4 * 12 + IN_CODES + 4),
    ],
)
def test_it_continues_across_the_renewal_of_its_basis_and_has_the_stated_bytes(
    name: str, how: dict[str, Any], expected: int
) -> None:
    options = make_options(name, rank=4, update_every=2, **how)

    def trained(stops: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
        weight, grads = nn.Parameter(torch.ones(20, 12)), list(gradients((20, 12)))
        saved: Any = None
        for first, last in zip((0, *stops), (*stops, UPDATES), strict=True):
            optimizer = build_optimizer([("q_proj.weight", weight)], options, lr=LR, weight_decay=DECAY, device=CPU)
            if saved is not None:
                load_named_state(optimizer, saved)
            for weight.grad in grads[first:last]:
                optimizer.step()
            saved = named_state(optimizer)
        return weight.detach(), saved["state"]["q_proj.weight"]

    (straight, state), (stopped, again) = trained(()), trained((5, 8))
    assert torch.equal(straight, stopped)
    assert name != "q_galore" or state["interval"] == again["interval"] > 2
    kept = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    assert kept == expected == options.state_bytes(ParamInfo("q_proj.weight", (20, 12), 4, "projection"))


def test_projected_moments_are_wider_than_narrow_weights_if_wanted() -> None:
    """And those of the other parameters with them."""
    weights = {name: nn.Parameter(torch.ones(20, 12, dtype=torch.bfloat16)) for name in ("q.weight", "embed.weight")}
    infos = {
        name: ParamInfo(name, (20, 12), 2, role)
        for name, role in zip(weights, ("projection", "embedding"), strict=True)
    }
    for moments_dtype, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        options = make_options("galore", moments_dtype=moments_dtype)
        optimizer = build_optimizer(weights.items(), options, lr=0.01, weight_decay=0.0, device=CPU, infos=infos)
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = optimizer.state.values()
        assert {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")} == {dtype}
        kept = sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
        assert kept == state_bytes(options, infos.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("numel", [1, 255, 256, 300, 1001])
def test_codes_are_the_nearest_of_a_group(bits: int, numel: int) -> None:
    """Groups of one sign too; what is all zero stays so."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) + 5
    values[256:512] = 0
    stored = encode_few(values, bits)
    assert len(stored.codes) == math.ceil(numel * bits / 8) and len(stored.steps) == math.ceil(numel / 256)
    error = (decode_few(stored, numel, bits) - values).abs()
    for i, step in enumerate(stored.steps.tolist()):
        assert error[256 * i : 256 * (i + 1)].max() <= 0.501 * step
        assert step == pytest.approx(values[256 * i : 256 * (i + 1)].max().item() / (2**bits - 1), rel=1e-6)


def test_scale_takes_a_model_that_has_no_matrices() -> None:
    """As those of method=sparse: kept values, embedding and head."""
    infos = [ParamInfo("embed.weight", (30, 8), 4, "embedding"), ParamInfo("up.values", (8, 4), 4, "values")]
    build.check_takes(make_options("scale"), infos)
    with pytest.raises(ValueError, match="optimizer=galore takes none .* set optimizer.rank below 4 .*or choose"):
        build.check_takes(make_options("galore"), infos)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method=switchlora optimizer=muon optimizer.momentum_dtype=int8", "holds in another form"),
        ("method=switchlora optimizer=lion dtype=bfloat16 stochastic_rounding=true", "holds in another form"),
        (
            "method=structured_ffn method.structure=block_shuffle optimizer=scaled_adamw",
            "are blocks; set optimizer=muon",
        ),
        ("optimizer=spectron per_layer_update=true", "per_layer_update=true works on one tensor at a time"),
        ("optimizer=muon moments_dtype=float32", "optimizer=muon has moments of its own kind; drop one"),
        ("optimizer=q_galore moments_dtype=float32", "optimizer=q_galore has 8bit ones; drop one"),
        ("optimizer=galore optimizer.moments_dtype=8bit moments_dtype=float32", "optimizer=galore has 8bit ones"),
    ],
)
def test_methods_and_optimizers_that_do_not_go_together_are_one_line(tiny: list[str], typed: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(compose_config([*tiny, *typed.split()], TRAIN))
