"""compile=true: the same loss and gradients, for every method, support and path, and a run from end to end."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sltrain import kernels
from sltrain.building.model import build_model
from sltrain.compose import conf_dir, register_schema, to_train_config

pytestmark = pytest.mark.slow

CASES = [("full", []), ("low_rank", [])] + [
    (f"{support} {path}", [f"support={support}", f"layer_path={path}"])
    for support in ("uniform", "stratified", "block", "column")
    for path in ("composed", "factored")
]


def small_model(overrides: list[str]) -> torch.nn.Module:
    register_schema()
    shape = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1"]
    recipe = ["model=llama_tiny", *shape, "rank=8", "sparsity=0.1", "max_steps=1", *overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = to_train_config(compose("train", recipe))
    model = build_model(config, 64, torch.float32)
    model.to_empty(device="cpu").init_weights(0)
    for module in model.modules():
        if hasattr(module, "path"):
            module.path = config.layer_path
            torch.nn.init.normal_(module.B, std=0.1)
    return model


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("name", "overrides"), CASES, ids=[name for name, _ in CASES])
def test_a_compiled_model_is_the_model(
    name: str, overrides: list[str], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(kernels, "status", lambda: "switched off")
    if "factored" not in name and not kernel:
        pytest.skip("the kernel has no part in it")
    torch._dynamo.reset()
    model = small_model([*overrides, f"method={name}"] if not overrides else overrides)
    input_ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = run(input_ids, input_ids)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_run(
    tiny: list[str], tmp_path: Path, sltrain_train: Callable[..., tuple[int, str, str]], metrics_of: Callable
) -> None:
    """With torch's real compiler, and padded rows, whose number changes from update to update."""
    recipe = [*tiny, "layer_path=factored", "model.num_hidden_layers=1"]
    for name in ("eager", "compiled"):
        code, _, err = sltrain_train(*recipe, f"compile={name == 'compiled'}", f"run_dir={tmp_path}/{name}")
        assert code == 0, err
    eager, compiled = (
        [line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("eager", "compiled")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
