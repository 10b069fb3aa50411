"""Averaged weights: beside torch's own average, and through a run, its evaluations and its export."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sltrain
from sltrain.building.model import allocate, build_model
from sltrain.compose import read_config
from sltrain.engine.ema import Average

Run = Callable[..., tuple[int, str, str]]


def test_it_is_torchs_average_of_the_weights_in_float32() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(7, 5, dtype=dtype), nn.Linear(5, 3, dtype=dtype))
        model[1].bias.requires_grad_(False)
        exact = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
        exact.load_state_dict(model.state_dict())
        mine = Average(model, 0.9)
        theirs = AveragedModel(exact, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        theirs.update_parameters(exact)  # its first call copies
        for _ in range(30):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            exact.load_state_dict(model.state_dict())
            mine.update()
            theirs.update_parameters(exact)
        expected = dict(theirs.module.named_parameters())
        assert mine.values.keys() == expected.keys() - {"1.bias"}
        for name, average in mine.values.items():
            torch.testing.assert_close(average, expected[name].detach(), rtol=1e-5, atol=1e-6)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(KeyboardInterrupt), mine.in_model():
            assert torch.equal(model[0].weight, mine.values["0.weight"].to(dtype))
            raise KeyboardInterrupt
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_run_evaluates_and_gives_its_averages(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    """The averages of all its checkpoints, computed here, are what load, evaluate and export read."""
    run = tmp_path / "run"
    code, out, err = sltrain_train(*tiny, "ema=0.6", "checkpoint_every=1", "keep_last=9", f"run_dir={run}")
    assert code == 0 and "evaluations and exports are of the averaged weights" in out, err
    model = build_model(read_config(run / "config.yaml"), 512, torch.float32)
    allocate(model, torch.device("cpu"))
    model.init_weights(42)
    averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = sorted((run / "checkpoints").glob("step_*"))
    assert len(steps) == 6
    for step in steps:
        weights = load_file(step / "model.safetensors")
        averages = {name: 0.6 * average + 0.4 * weights[name] for name, average in averages.items()}
    loaded = dict(sltrain.load(run).named_parameters())
    for name, average in averages.items():
        torch.testing.assert_close(loaded[name].detach(), average, rtol=1e-5, atol=1e-7)
    final = json.loads((run / "summary.json").read_text())
    assert sltrain.evaluate(run)["loss"] == final["loss"]
    exported = sltrain.export(run, tmp_path / "compressed", format="compressed")
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(sltrain.load(exported)(ids), sltrain.load(run)(ids))

    damaged = run / "checkpoints" / "step_00000006" / "action.ema.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    before = dict(sltrain.load(run, step=5).named_parameters())
    assert all(torch.equal(before[name], p) for name, p in sltrain.load(run).named_parameters()), "the intact one"
    with pytest.raises(sltrain.Error, match="action.ema.pt does not match its SHA-256"):
        sltrain.load(run, step=6)
