"""compile=true: the same loss and gradients of a model, and a run from end to end."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sltrain.building.model import build_model
from sltrain.compose import TRAIN, compose_config

pytestmark = pytest.mark.slow


def small_model(support: str, path: str) -> torch.nn.Module:
    shape = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1", "max_steps=1"]
    config = compose_config(["model=llama_tiny", *shape, "rank=8", "sparsity=0.1", f"support={support}"], TRAIN)
    model = build_model(config, 64, torch.float32)
    model.to_empty(device="cpu").init_weights(0)
    for module in model.modules():
        if hasattr(module, "path"):
            module.path = path
            torch.nn.init.normal_(module.B, std=0.1)
    return model


def agrees_compiled(module: torch.nn.Module, run: Callable[[Callable[..., Tensor]], Tensor]) -> None:
    torch._dynamo.reset()
    results = []
    for function in (module, torch.compile(module, backend="aot_eager")):
        module.zero_grad()
        found = run(function)
        found.sum().backward()
        results.append([found.detach(), *(p.grad for p in module.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("path", ["composed", "factored"])
def test_a_compiled_model_is_the_model(path: str) -> None:
    """tests/layers/test_functional.py compiles every support in every path."""
    input_ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    agrees_compiled(small_model("uniform", path), lambda model: model(input_ids, input_ids))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_run(
    tiny: list[str], tmp_path: Path, sltrain_train: Callable[..., tuple[int, str, str]], metrics_of: Callable
) -> None:
    """With torch's real compiler, and padded rows, whose number changes from update to update."""
    recipe = [*tiny, "layer_path=factored", "model.num_hidden_layers=1", "max_steps=3", "eval_tokens=100"]
    for name in ("eager", "compiled"):
        code, _, err = sltrain_train(*recipe, f"compile={name == 'compiled'}", f"run_dir={tmp_path}/{name}")
        assert code == 0, err
    eager, compiled = (
        [line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("eager", "compiled")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
