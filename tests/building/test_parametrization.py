"""parametrization=spectral: its table against numbers worked out by hand, and what the table is for, updates whose
effect does not depend on width, rank, sparsity and alpha."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resuming import resumes_bit_for_bit
from torch import Tensor, nn

from sltrain.building.model import allocate, build_model
from sltrain.building.trainer import build_updates
from sltrain.compose import TRAIN, compose_config
from sltrain.config import TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.strategy import Single
from sltrain.models.llama import PROJECTIONS, LlamaForCausalLM
from sltrain.optim.build import set_learning_rate

CPU, VOCAB = torch.device("cpu"), 64
Run = Callable[..., tuple[int, str, str]]


def built(*typed: str) -> tuple[LlamaForCausalLM, torch.optim.Optimizer, TrainConfig]:
    """The model that a run of llama_tiny with these overrides begins with, and its optimizer."""
    config = compose_config(["model=llama_tiny", "data=stdlib", "model.num_hidden_layers=1", *typed], TRAIN)
    model = build_model(config, VOCAB, torch.float32)
    allocate(model, CPU)
    model.init_weights(0)
    return model, build_updates(config, model, Single(Ranks(0, 1, CPU))), config


SHAPE = ["model.hidden_size=64", "model.intermediate_size=96", "rank=16", "alpha=8", "sparsity=0.125"]
SHAPE += ["model.initializer_range=0.01", "parametrization=spectral", "parametrization.base_width=32"]
# Tensor -> (standard deviation, factor of lr), of a 64 x 64 and a 64 x 96 matrix. s = 8 / 16 = 1/2; sigma sqrt(w) is
# 0.01 sqrt(32) = 0.0565685.
HEAD = {"lm_head.weight": (0.005, 1 / 2), "model.embed_tokens.weight": (0.01, 1.0)}
A = {"q_proj.A": (1 / 16, 1 / 4), "down_proj.A": (1 / 24, 1 / 6)}
TABLES: dict[str, dict[str, tuple[float, float]]] = {
    "method=full": {"q_proj.weight": (0.00707107, 1 / 2), "down_proj.weight": (0.00577350, 1 / 3)},
    "method=low_rank": {
        "q_proj.A": (0.00707107, 1 / 4),
        "q_proj.B": (1 / 2, 2.0),
        "down_proj.A": (0.00577350, 1 / 6),
        "down_proj.B": (1 / 2, 2.0),
    },
    "method=low_rank method.gain=2": {"q_proj.A": (0.0141421, 1 / 4), "q_proj.B": (1 / 2, 2.0)},
    "method=sltrain": {
        **A,
        "q_proj.B": (0.0, 2.0),
        "down_proj.B": (0.0, 2.0),
        "q_proj.values": (0.02, 1 / 2),
        "down_proj.values": (0.0163299, 1 / 3),
    },
    "method=sltrain rank=0": {"q_proj.values": (0.02, 4.0), "down_proj.values": (0.0163299, 8 / 3)},
    "method=sltrain sparsity=0": {"q_proj.A": (0.00707107, 1 / 4), "q_proj.B": (1 / 2, 2.0)},
    "method=sltrain support=block lr_scale={values:3,factor:2}": {
        "q_proj.A": (1 / 16, 1 / 2),
        "q_proj.B": (0.0, 4.0),
        "q_proj.values": (0.02, 3 / 2),
    },
}


@pytest.mark.parametrize("typed", TABLES)
def test_starts_and_rates_are_those_worked_out_by_hand(typed: str) -> None:
    model, optimizer, _ = built(*SHAPE, *typed.split())
    tensors = dict(model.named_parameters())
    rates = {name: group.get("lr_scale", 1.0) for group in optimizer.param_groups for name in group["param_names"]}
    for leaf, (std, rate) in {**HEAD, **TABLES[typed]}.items():
        [name] = [name for name in tensors if name.endswith(leaf)]
        assert rates[name] == pytest.approx(rate, rel=1e-6), name
        assert tensors[name].std().item() == pytest.approx(std, rel=0.12), name  # of 512 draws and more
    assert all(rates[name] == 1 for name in tensors if "norm" in name)


def test_paper_has_no_rates_of_its_own() -> None:
    for method in ("full", "low_rank", "sltrain"):
        model, optimizer, _ = built(f"method={method}")
        assert all("lr_scale" not in group for group in optimizer.param_groups)
        assert not any(getattr(module, "starts", {}) for module in model.modules())


def changes(*typed: str) -> dict[str, float]:
    """The RMS change of the output of each projection within 10 updates on 4 rows of 16 random tokens, by its name."""
    model, optimizer, config = built(*typed, "lr=2e-3")
    ids = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    before = outputs(model, ids)
    for _ in range(10):
        optimizer.zero_grad()
        (model(ids, ids) / 60).backward()
        set_learning_rate(optimizer, config.lr)
        optimizer.step()
    after = outputs(model, ids)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in after}


@torch.no_grad()
def outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What each projection gives for these tokens. On the other path a layer runs no hooks."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in PROJECTIONS:
            module.path = "composed"  # type: ignore[assignment]
            hooks.append(module.register_forward_hook(lambda _, __, y, leaf=leaf: found.update({leaf: y})))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def sized(width: int, share: float = 0.25) -> list[str]:
    """A model of this width, with heads of 32 numbers and that share of the width as rank."""
    heads, rank = width // 32, int(width * share)
    shape = f"model.hidden_size={width} model.intermediate_size={2 * width} model.num_attention_heads={heads}"
    return [*shape.split(), f"rank={rank}"]


WIDTHS = [sized(width) for width in (64, 128, 256, 512)]
RANKS = [sized(256, share) for share in (1 / 8, 1 / 2)]
ALPHAS = [[*sized(64), f"alpha={alpha}"] for alpha in (4, 64)]
SPARSITIES = [[*sized(256), f"sparsity={sparsity}"] for sparsity in (0.01, 0.1)]
GRIDS = {"full": WIDTHS, "low_rank": [*WIDTHS, *RANKS, *ALPHAS], "sltrain": [*WIDTHS, *RANKS, *ALPHAS, *SPARSITIES]}


def spread(method: str, parametrization: str, grid: list[list[str]]) -> float:
    """The largest over the smallest change of an output over the grid, of the projection where this is most."""
    of_grid = [changes(f"method={method}", f"parametrization={parametrization}", *typed) for typed in grid]
    return max(max(of[name] for of in of_grid) / min(of[name] for of in of_grid) for name in of_grid[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", GRIDS)
def test_updates_have_the_same_effect_at_every_size(method: str) -> None:
    """The coordinate check of muP (arXiv 2203.03466, appendix D.1), over ranks, alphas and sparsities too."""
    assert spread(method, "spectral", GRIDS[method]) < 1.5
    assert spread(method, "paper", [WIDTHS[0], WIDTHS[-1]]) > 1.5


@pytest.mark.slow
def test_a_run_says_so_and_continues_bit_for_bit(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    """With a rate for each tensor, in backward too; a run of another parametrization is not continued."""
    typed = [*tiny, "parametrization=spectral", "per_layer_update=true", "grad_clip=null", "lr=1e-3"]
    resumes_bit_for_bit(typed, sltrain_train, tmp_path, at=[3])
    code, _, err = sltrain_train(*tiny, "per_layer_update=true", "lr=1e-3", f"run_dir={tmp_path}/straight")
    assert code == 2 and "parametrization.name was 'spectral', is now 'paper'" in err
    code, out, _ = sltrain_train(*typed, "max_steps=1", "warmup_steps=0", f"run_dir={tmp_path}/other")
    assert code == 0 and "adamw, parametrization spectral (base width 128)" in out
