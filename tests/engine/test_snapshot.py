"""Copies of what a checkpoint holds: equal to what was there, whatever happens to it afterwards."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import ALONE, make_optimizer
from resuming import assert_equal
from torch import nn

from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.snapshot import HostCopy
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.named_state import OptimizerState


class Kept:
    """What an action might keep: nested, with a tensor in two places, a transposed one and a number of updates."""

    def __init__(self) -> None:
        shared = torch.tensor([1, 2, 3, 4, 65_535], dtype=torch.uint16)
        self.values: dict[str, Any] = {
            "both": [shared, {"again": shared}],
            "transposed": torch.randn(3, 4).t(),
            "empty": torch.zeros(0, 2),
            "step": torch.tensor(3.0),
            "plain": (1, "two", [3.0]),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.values


def contents(model: nn.Module, kept: Kept, step: int = 1) -> Contents:
    return Contents.of(step, model, {"action/kept": kept}, {"progress": {"step": step}})


def spoil(value: Any) -> None:
    """Change every tensor and list in place."""
    if isinstance(value, torch.Tensor):
        value.detach().zero_()
    elif isinstance(value, list):
        for each in value:
            spoil(each)
        value.append("more")
    elif isinstance(value, dict | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            spoil(each)


def test_a_copy_keeps_what_was_there() -> None:
    model, kept, progress = nn.Linear(3, 2, dtype=torch.bfloat16), Kept(), {"step": 1}
    model.register_buffer("indices", torch.tensor([1, 65_535], dtype=torch.uint16))
    live = Contents.of(1, model, {"action/kept": kept}, {"progress": progress})
    before, host = deepcopy((live.tensors, live.objects)), HostCopy()
    copied = host.take(live)
    progress["step"] = 2
    spoil([live.tensors, live.objects])
    assert_equal((copied.tensors, copied.objects), before)
    assert copied.state == '{"progress": {"step": 1}, "step": 1}'
    state = copied.objects["action/kept"]
    assert state["both"][0] is state["both"][1]["again"] and state["transposed"].stride() == (1, 4)
    assert host.nbytes == 2 * 6 + 2 * 2 + 2 * 2 + 2 * 5 + 4 * 12 + 4


def test_the_next_copy_has_the_memory_of_the_last() -> None:
    model, kept, host = nn.Linear(3, 2), Kept(), HostCopy()

    def places(copied: Contents) -> list[int]:
        state = copied.objects["action/kept"]
        return [tensor.data_ptr() for tensor in (*copied.tensors.values(), state["both"][0], state["step"])]

    first, size = places(host.take(contents(model, kept))), host.nbytes
    spoil(kept.values["both"][0])
    again = host.take(contents(model, kept, 2))
    assert places(again) == first and host.nbytes == size
    assert not again.objects["action/kept"]["both"][0].any()
    kept.values["both"] = kept.values["transposed"] = None  # what is gone is not held
    kept.values["step"] = torch.zeros(2)  # nor is what has another shape
    assert host.take(contents(model, kept)).objects["action/kept"]["step"].shape == (2,)
    assert host.nbytes == size - 2 * 5 - 4 * 12 + 4
    host.free()
    assert host.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALONE)
def test_files_of_a_copy_are_those_of_the_original(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Byte for byte, though training goes on before they are written."""
    if (package := OPTIMIZERS.load(name).package) is not None:
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 5)).to(dtype)
    optimizer = make_optimizer(
        model.named_parameters(),
        name=name,
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.1,
        device=torch.device("cpu"),
    )

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).to(dtype)
        optimizer.step()

    update()
    live = Contents.of(1, model, {"optimizer": OptimizerState(optimizer, [])}, {})
    at_once = Checkpointer(tmp_path / "a", 1).write(live)
    copied = HostCopy().take(live)
    update()
    later = Checkpointer(tmp_path / "b", 1).write(copied)
    for file in ("model.safetensors", "optimizer.pt", "state.json"):
        assert (later / file).read_bytes() == (at_once / file).read_bytes(), file
    other = Checkpointer(tmp_path / "c", 1).write(
        Contents.of(1, model, {"optimizer": OptimizerState(optimizer, [])}, {})
    )
    assert (other / "model.safetensors").read_bytes() != (at_once / "model.safetensors").read_bytes()
