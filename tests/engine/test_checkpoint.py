"""A checkpoint restores every bit, or gives the reason; and whatever interrupts a save, an intact one remains."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import ALONE, make_optimizer
from torch import nn

from sltrain.engine import checkpoint_files
from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import CheckpointError, Contents, load_object, unwrap
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.named_state import OptimizerState
from sltrain.optim.per_layer import PerLayerUpdate
from sltrain.optim.wrapper import innermost


class Net(nn.Module):
    """Weights, an int32 index buffer, an empty tensor and a tied weight: what checkpoints meet in practice."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = nn.Linear(4, width, dtype=dtype)
        self.down = nn.Linear(width, 4, dtype=dtype)
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=dtype))
        self.register_buffer("indices", torch.randint(0, 100, (7,), generator=generator, dtype=torch.int32))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.tied = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Updates first..last, each with data of its own."""
    for step in range(first, last + 1):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=1e-2, fused=True)


def objects(optimizer: torch.optim.Optimizer) -> dict[str, Stateful]:
    """What a checkpoint holds besides the model."""
    return {"optimizer": OptimizerState(optimizer, [])}


def saved_adamw(model: nn.Module) -> dict[str, Stateful]:
    return objects(adamw(model))


def flat_state(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (i, key): value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for i, parameter in enumerate(parameters)
        for key, value in optimizer.state[parameter].items()
    }


def assert_same(left: nn.Module, right: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Bit for bit, dtypes included."""
    for (name, a), (_, b) in zip(left.state_dict().items(), right.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    if optimizers:
        first, second = map(flat_state, optimizers)
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_straight_run_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    straight = Net(dtype=dtype)
    straight_optimizer = adamw(straight)
    train(straight, straight_optimizer, 1, 6)

    first = Net(dtype=dtype)
    first_optimizer = adamw(first)
    train(first, first_optimizer, 1, 3)
    state = {"tokens": 123, "stream": {"0": {"block": 2, "epoch": 0}}, "loss": 0.1 + 0.2}
    path = Checkpointer(tmp_path, keep_last=2).write(Contents.of(3, first, objects(first_optimizer), state))
    assert path == tmp_path / "checkpoints" / "step_00000003"
    assert (tmp_path / "checkpoints" / "latest").resolve() == path.resolve()

    second = Net(dtype=dtype, seed=99)
    second_optimizer = adamw(second)
    addresses = {name: tensor.data_ptr() for name, tensor in second.state_dict().items()}
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    found = checkpointer.find_latest()
    assert found == path
    assert checkpointer.load(found, second, objects(second_optimizer)) == {**state, "step": 3}
    assert addresses == {name: tensor.data_ptr() for name, tensor in second.state_dict().items()}, "loading is in place"
    assert_same(first, second, first_optimizer, second_optimizer)
    train(second, second_optimizer, 4, 6)
    assert_same(straight, second, straight_optimizer, second_optimizer)


def test_manifest_can_be_checked_with_other_tools(tmp_path: Path) -> None:
    model = Net()
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, saved_adamw(model), {}))
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        output = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout
        assert output.split()[0] == entry["sha256"] and (path / name).stat().st_size == entry["bytes"]


@pytest.mark.parametrize(("parameters", "moments"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_moments_keep_their_dtype(tmp_path: Path, parameters: str, moments: str) -> None:
    """torch's load_state_dict alone would round these moments to the parameters' dtype, or widen them."""
    model = Net(dtype=getattr(torch, parameters))
    optimizer = adamw(model)
    train(model, optimizer, 1, 2)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.randn(state[key].shape).to(getattr(torch, moments))
    path = Checkpointer(tmp_path, 0).write(Contents.of(2, model, objects(optimizer), {}))
    other = Net(dtype=getattr(torch, parameters), seed=1)
    other_optimizer = adamw(other)
    Checkpointer(tmp_path, 0).load(path, other, objects(other_optimizer))
    assert_same(model, other, optimizer, other_optimizer)


def sized(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """Parameters of the sizes at which small states change: quantized, too small for it, not made of whole blocks."""
    model = nn.Module()
    generator = torch.Generator().manual_seed(seed)
    for i, shape in enumerate([(100, 64), (10,), (4097,), (5, 1000)]):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    return model


def build(name: str, model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    if (package := OPTIMIZERS.load(name).package) is not None:
        pytest.importorskip(package)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    return make_optimizer(model.named_parameters(), name=name, device=torch.device("cpu"), **{**settings, **how})


def update_sized(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The values of a state as tensors."""
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors_of(each)]
    return [value] if isinstance(value, torch.Tensor) else [torch.tensor(value)]


def assert_same_state(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """As flat_state, and also for tensors that torch.equal does not know."""
    for ours, theirs in zip(innermost(left), innermost(right), strict=True):  # they may have pieces of the parameters
        pairs = zip(
            *([p for group in each.param_groups for p in group["params"]] for each in (ours, theirs)), strict=True
        )
        for a, b in pairs:
            assert torch.equal(a, b) and ours.state[a].keys() == theirs.state[b].keys()
            for x, y in zip(tensors_of(ours.state[a]), tensors_of(theirs.state[b]), strict=True):
                assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("how", [{}, {"stochastic_rounding": True, "seed": 4}], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", ALONE)
def test_every_optimizer_resumes_bit_for_bit(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    straight, first, second = sized(), sized(), sized(seed=1)
    optimizers = [build(name, model, **how) for model in (straight, first, second)]
    update_sized(straight, optimizers[0], 1, 6)
    update_sized(first, optimizers[1], 1, 3)
    path = Checkpointer(tmp_path, 0).write(Contents.of(3, first, objects(optimizers[1]), {}))
    Checkpointer(tmp_path, 0).load(path, second, objects(optimizers[2]))
    assert_same_state(optimizers[1], optimizers[2])
    update_sized(second, optimizers[2], 4, 6)
    assert_same_state(optimizers[0], optimizers[2])


@pytest.mark.parametrize("name", ALONE)
def test_the_state_is_never_held_twice(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state itself, and what is read becomes it."""
    seen: dict[str, Any] = {}
    save, load = torch.save, torch.load

    def spy_save(content: Any, file: Any) -> None:
        seen["written"] = addresses(content["state"])
        save(content, file)

    def spy_load(*args: Any, **how: Any) -> Any:
        content = load(*args, **how)
        seen["read"] = addresses(content["state"])
        return content

    def addresses(state: Any) -> set[int]:
        return {tensor.data_ptr() for tensor in tensors_of(dict(state)) if tensor.ndim}

    monkeypatch.setattr(torch, "save", spy_save)
    monkeypatch.setattr(torch, "load", spy_load)
    model, other = sized(), sized(seed=1)
    optimizer, other_optimizer = build(name, model), build(name, other)
    update_sized(model, optimizer, 1, 1)
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, objects(optimizer), {}))
    assert seen["written"] == addresses(optimizer.state)
    Checkpointer(tmp_path, 0).load(path, other, objects(other_optimizer))
    assert seen["read"] == addresses(other_optimizer.state)
    assert seen["read"] or name == "sgd", "which keeps nothing"


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("is_outer_first", [True, False])
def test_what_works_through_another_optimizer_leaves_no_trace(tmp_path: Path, is_outer_first: bool, name: str) -> None:
    """A run with updates inside backward continues one without, and the other way."""
    model, other, straight = sized(), sized(seed=1), sized()
    optimizers = [build(name, each) for each in (model, other, straight)]
    optimizers[0 if is_outer_first else 1] = PerLayerUpdate(optimizers[0 if is_outer_first else 1])
    update_sized(straight, optimizers[2], 1, 4)
    update_sized(model, optimizers[0], 1, 2)
    path = Checkpointer(tmp_path, 0).write(Contents.of(2, model, objects(optimizers[0]), {}))
    assert torch.load(path / "optimizer.pt", weights_only=True)["class"] == " + ".join(
        type(leaf).__name__ for leaf in innermost(optimizers[2])
    )
    Checkpointer(tmp_path, 0).load(path, other, objects(optimizers[1]))
    update_sized(other, optimizers[1], 3, 4)
    assert_same_state(optimizers[1], optimizers[2])


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_kinds_of_adamw_read_each_others_state(tmp_path: Path, ours_first: bool) -> None:
    """Settings that only one of them has stay as they are; those of the file count for the rest."""
    model, other = sized(torch.float32), sized(torch.float32, seed=1)
    ours, torchs = {"stochastic_rounding": True, "lr": 0.5}, {"lr": 0.25}
    optimizer = build("adamw", model, **(ours if ours_first else torchs))
    other_optimizer = build("adamw", other, **(torchs if ours_first else ours))
    keys = set(other_optimizer.param_groups[0])
    update_sized(model, optimizer, 1, 2)
    path = Checkpointer(tmp_path, 0).write(Contents.of(2, model, objects(optimizer), {}))
    Checkpointer(tmp_path, 0).load(path, other, objects(other_optimizer))
    assert_same_state(optimizer, other_optimizer)
    assert set(other_optimizer.param_groups[0]) == keys
    assert other_optimizer.param_groups[0]["lr"] == (0.5 if ours_first else 0.25)
    assert other_optimizer.param_groups[0].get("fused", True), "torch's is still the fused one"


@pytest.mark.parametrize("fused", [True, False])
def test_state_leaves_the_file_for_another_device(tmp_path: Path, fused: bool) -> None:
    """As for a GPU, with the meta device in its place: tensors go where their parameter is, step counts where they are
    read, and what parameters share is shared."""
    model = sized()
    optimizer = torch.optim.AdamW(model.named_parameters(), fused=fused)
    update_sized(model, optimizer, 1, 1)
    shared = torch.ones(3)
    for state in optimizer.state.values():
        state["shared"] = shared
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, objects(optimizer), {}))
    there = sized().to("meta")
    elsewhere = torch.optim.AdamW(there.named_parameters())
    elsewhere.param_groups[0]["fused"] = fused
    load_object(path / "optimizer.pt", OptimizerState(elsewhere, []), is_on_cpu=False)
    for state in elsewhere.state.values():
        assert state["exp_avg"].is_meta and state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].is_meta == fused
    assert len({id(state["shared"]) for state in elsewhere.state.values()}) == 1


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    layerwise = Net()
    layerwise.up = torch.compile(layerwise.up, backend="eager")  # type: ignore[assignment]
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, compiled, saved_adamw(model), {}))
    other = Net(seed=5)
    Checkpointer(tmp_path, 0).load(path, other, None)
    assert_same(model, other)
    Checkpointer(tmp_path, 0).load(path, layerwise, None)
    assert torch.equal(layerwise.down.weight, model.down.weight) and torch.equal(layerwise.tied, model.tied)


def test_ddp_is_looked_through(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
        assert unwrap(wrapped) is model
        path = Checkpointer(tmp_path, 0).write(Contents.of(1, wrapped, saved_adamw(model), {}))
        other = Net(seed=5)
        Checkpointer(tmp_path, 0).load(path, other, None)
        assert_same(model, other)
    finally:
        torch.distributed.destroy_process_group()


def test_keep_last_and_leftovers(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    folder = tmp_path / "checkpoints"
    keeper = Checkpointer(tmp_path, keep_last=2)
    (folder / "step_00000001.tmp").mkdir(parents=True)
    for step in (5, 10, 15, 20):
        keeper.write(Contents.of(step, model, objects(optimizer), {}))
    assert {p.name for p in folder.iterdir()} == {"step_00000015", "step_00000020", "latest"}
    Checkpointer(tmp_path, keep_last=1).write(Contents.of(17, model, objects(optimizer), {}))
    assert {p.name for p in folder.glob("step_*")} == {"step_00000017", "step_00000020"}, "never a later one"
    Checkpointer(tmp_path, keep_last=None).write(Contents.of(21, model, objects(optimizer), {}))
    assert len(list(folder.glob("step_*"))) == 3


def test_every_dtype_of_indices(tmp_path: Path) -> None:
    """S keeps its positions in the smallest integers that hold them; the largest value tells a signed from an unsigned
    one."""
    dtypes = [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]

    def build_indices(fill: Callable[[torch.dtype], int]) -> nn.Module:
        model = Net()
        for dtype in dtypes:
            model.register_buffer(str(dtype)[6:], torch.tensor([0, fill(dtype)], dtype=dtype))
        return model

    model, other = build_indices(lambda dtype: torch.iinfo(dtype).max), build_indices(lambda dtype: 0)
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, saved_adamw(model), {}))
    Checkpointer(tmp_path, 0).load(path, other, None)
    assert_same(model, other)
    wrong = Net()
    wrong.register_buffer("uint16", torch.zeros(2, dtype=torch.int16))
    with pytest.raises(CheckpointError, match=r"uint16: this run expects int16 \(2,\), .* has uint16 \(2,\)"):
        Checkpointer(tmp_path, 0).load(path, wrong, None)


def test_same_step_is_replaced(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=1)
    model = Net()
    for note in ("a", "b", "c"):
        path = keeper.write(Contents.of(7, model, saved_adamw(model), {"note": note}))
        assert keeper.load(path, model, None)["note"] == note
    assert {p.name for p in path.parent.iterdir()} == {"step_00000007", "latest"}


def damage_missing(path: Path) -> None:
    (path / "optimizer.pt").unlink()


def damage_short(path: Path) -> None:
    os.truncate(path / "model.safetensors", 100)


def damage_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": ')


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_short, damage_bit, damage_manifest, damage_no_manifest], ids=lambda f: f.__name__
)
def test_damaged_newest_falls_back(tmp_path: Path, damage: Callable[[Path], None], lines: list[str]) -> None:
    keeper = Checkpointer(tmp_path, keep_last=0)
    model = Net()
    good, newest = (keeper.write(Contents.of(step, model, saved_adamw(model), {})) for step in (1, 2))
    damage(newest)
    assert keeper.find_latest() == good
    assert len(lines) == 1 and str(newest) in lines[0] and "damaged" in lines[0]
    # Training continues from step 1, reaches step 2 again and replaces the damaged one.
    assert keeper.write(Contents.of(2, model, saved_adamw(model), {})) == newest == keeper.find_latest()
    assert len(lines) == 1


def test_nothing_to_find(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path, 1).find_latest() is None


def with_extra_parameter(model: Net) -> Net:
    model.extra = nn.Parameter(torch.zeros(2))
    return model


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: Net(width=9), ["expects float32 (9, 4)", "has float32 (8, 4)", "2 more"]),
        (lambda: Net(dtype=torch.bfloat16), ["bfloat16", "float32"]),
        (lambda: with_extra_parameter(Net()), ["extra", "expects float32 (2,)", "no such tensor"]),
        (lambda: nn.Linear(4, 4), ["weight", "expects float32 (4, 4)", "no such tensor"]),
    ],
    ids=["shape", "dtype", "name", "all"],
)
def test_another_model_is_refused_untouched(tmp_path: Path, other: Callable[[], nn.Module], words: list[str]) -> None:
    model = Net()
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, saved_adamw(model), {}))
    stranger = other()
    before = {name: tensor.clone() for name, tensor in stranger.state_dict().items()}
    with pytest.raises(CheckpointError, match="checkpoint of another model") as caught:
        Checkpointer(tmp_path, 0).load(path, stranger, saved_adamw(stranger))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in stranger.state_dict().items())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = Net()
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, saved_adamw(model), {}))
    with pytest.raises(CheckpointError, match="another optimizer: this run expects SGD, the file has AdamW"):
        Checkpointer(tmp_path, 0).load(path, model, objects(torch.optim.SGD(model.named_parameters())))


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """By name: groups may be others."""
    model = Net()
    first, *rest = model.named_parameters()
    *some, last = rest
    few, all_of_them = torch.optim.AdamW(some), torch.optim.AdamW([{"params": rest, "lr": 0.5}, {"params": [first]}])
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, objects(few), {}))
    words = (
        rf"another optimizer: parameter {last[0]}: this run trains it, the file does not \(1 more parameters differ\)"
    )
    with pytest.raises(CheckpointError, match=words):
        Checkpointer(tmp_path, 0).load(path, model, objects(all_of_them))
    path = Checkpointer(tmp_path, 0).write(Contents.of(2, model, saved_adamw(model), {}))
    with pytest.raises(CheckpointError, match=f"parameter {last[0]}: the file has it, this run does not"):
        Checkpointer(tmp_path, 0).load(path, model, objects(few))
    Checkpointer(tmp_path, 0).load(path, model, objects(all_of_them))
    assert [group["lr"] for group in all_of_them.param_groups] == [0.5, 1e-3], "settings go with a group's names"


class Pool:
    """What an action might keep: a tensor and plain data."""

    def __init__(self, value: float) -> None:
        self.tensor, self.names = torch.full((3,), value), [str(value)]

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "names": self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["tensor"].shape != self.tensor.shape:
            raise ValueError("another size")
        self.tensor.copy_(state["tensor"])
        self.names = state["names"]


def test_every_object_is_in_the_manifest_and_comes_back(tmp_path: Path) -> None:
    model, keeper = Net(), Checkpointer(tmp_path, 0)
    pool, other = Pool(0.25), Pool(0.0)
    path = keeper.write(Contents.of(1, model, {**saved_adamw(model), "action/pool": pool}, {}))
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "optimizer.pt", "action.pool.pt", "state.json"}
    keeper.load(path, model, {**saved_adamw(model), "action/pool": other})
    assert torch.equal(pool.tensor, other.tensor) and other.names == ["0.25"]
    other.tensor = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"checkpoint of another action.pool: another size .*run_dir\.$"):
        keeper.load(path, model, {**saved_adamw(model), "action/pool": other})
    damage = path / "action.pool.pt"
    damage.write_bytes(damage.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="action.pool.pt has"):
        keeper.find(1)
    assert Checkpointer(tmp_path, 0, to_train=False).find(1) == path, "to read a model it is not needed"


def test_objects_of_another_run_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model, keeper = Net(), Checkpointer(tmp_path, 0)
    plain = keeper.write(Contents.of(1, model, saved_adamw(model), {}))
    more = keeper.write(Contents.of(2, model, {**saved_adamw(model), "action/pool": Pool(1.0)}, {}))
    other = Net(seed=3)
    with pytest.raises(CheckpointError, match="has no action.pool.pt, which this run needs"):
        keeper.load(plain, other, {**saved_adamw(other), "action/pool": Pool(1.0)})
    with pytest.raises(CheckpointError, match="has action.pool.pt, unknown to this run"):
        keeper.load(more, other, saved_adamw(other))
    assert_same(other, Net(seed=3))
    assert keeper.load(more, other, None) == {"step": 2} == keeper.read_state(more)


@pytest.mark.parametrize("how", [{}, {"stochastic_rounding": True, "seed": 4}], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["adamw", "adam8bit"])
def test_a_state_by_index_of_an_earlier_version_continues(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    """Files of the first format hold torch's state_dict; its groups are weights that decay, and the others."""
    straight, first, second = (Net(width=1100, dtype=torch.bfloat16, seed=seed) for seed in (0, 0, 1))
    optimizers = [build(name, model, **how) for model in (straight, first, second)]
    update_sized(straight, optimizers[0], 1, 4)
    update_sized(first, optimizers[1], 1, 2)
    path = Checkpointer(tmp_path, 0).write(Contents.of(2, first, objects(optimizers[1]), {}))
    (inner,) = innermost(optimizers[1])
    torch.save({"class": type(inner).__name__, "state_dict": inner.state_dict()}, path / "optimizer.pt")
    names = [parameter_name for parameter_name, _ in second.named_parameters()]
    Checkpointer(tmp_path, 0).load(path, second, {"optimizer": OptimizerState(optimizers[2], names)})
    assert_same_state(optimizers[1], optimizers[2])
    update_sized(second, optimizers[2], 3, 4)
    assert_same_state(optimizers[0], optimizers[2])

    sgd = OptimizerState(torch.optim.SGD(second.named_parameters()), names)
    with pytest.raises(CheckpointError, match="another optimizer: this run expects SGD, the file has "):
        Checkpointer(tmp_path, 0).load(path, second, {"optimizer": sgd})
    few = build(name, second.up)
    fewer = OptimizerState(few, ["weight", "bias"])
    with pytest.raises(
        CheckpointError, match="another optimizer: this run expects groups of .* parameters, the file has"
    ):
        Checkpointer(tmp_path, 0).load(path, second, {"optimizer": fewer})


def test_code_in_an_optimizer_file_is_not_run(tmp_path: Path) -> None:
    model = Net()
    path = Checkpointer(tmp_path, 0).write(Contents.of(1, model, saved_adamw(model), {}))
    torch.save({"class": "AdamW", "state": Path("/")}, path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="could not be loaded") as caught:
        Checkpointer(tmp_path, 0).load(path, model, saved_adamw(model))
    assert "\n" not in str(caught.value)


# ---- interruptions


class Crash(BaseException):
    """The process ends here; nothing of ours may catch it."""


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Iterator[int]:
    """Let the `number`-th operation that changes the disk raise. Yields how many were begun."""
    count = 0

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise error
            return original(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for owner, name in [
            (os, "fsync"), (os, "rename"), (os, "replace"), (os, "symlink"), (os, "unlink"), (os, "rmdir"),
            (checkpoint_files, "save_file"), (torch, "save"), (Path, "write_text"), (Path, "mkdir"),
        ]:  # fmt: skip
            patch.setattr(owner, name, guarded(getattr(owner, name)))
        yield count
    yield count


def interrupted_save(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, step: int, number: int, error: BaseException
) -> BaseException | None:
    """Save `step` with the `number`-th disk operation failing; what was raised, None if the save ended before."""
    model = Net(seed=step)
    attempt = fail_at(monkeypatch, number, error)
    next(attempt)
    try:
        Checkpointer(run_dir, keep_last=1).write(
            Contents.of(step, model, saved_adamw(model), {"note": f"step {step}, new"})
        )
        return None
    except BaseException as raised:
        return raised
    finally:
        next(attempt)


@pytest.mark.parametrize("second", [2, 1], ids=["next step", "same step again"])
def test_crash_at_every_disk_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: int, lines: list[str]
) -> None:
    outcomes = set()
    for number in range(1, 100):
        run_dir = tmp_path / str(number)
        model = Net(seed=1)
        Checkpointer(run_dir, keep_last=1).write(Contents.of(1, model, saved_adamw(model), {"note": "step 1, old"}))
        raised = interrupted_save(monkeypatch, run_dir, second, number, Crash())
        found = Checkpointer(run_dir, keep_last=1).find_latest()
        assert found is not None and not lines
        loaded = Net(seed=50)
        state = Checkpointer(run_dir, keep_last=1).load(found, loaded, saved_adamw(loaded))
        assert_same(loaded, Net(seed=state["step"]))
        assert state["note"] in ("step 1, old", f"step {second}, new")
        outcomes.add(state["note"])
        # The next process finishes its work in the same folder, whatever lies about.
        Checkpointer(run_dir, keep_last=1).write(Contents.of(3, model, saved_adamw(model), {}))
        assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"step_00000003", "latest"}
        if raised is None:
            break
        assert isinstance(raised, Crash)
    assert raised is None and number > 15, "every operation was tried"
    assert outcomes == {"step 1, old", f"step {second}, new"}


def test_full_disk_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    for number in range(1, 100):
        run_dir = tmp_path / str(number)
        model = Net(seed=1)
        Checkpointer(run_dir, keep_last=1).write(Contents.of(1, model, saved_adamw(model), {}))
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raised = interrupted_save(monkeypatch, run_dir, 2, number, full)
        found = Checkpointer(run_dir, keep_last=1).find_latest()
        assert found is not None and not lines
        if raised is None and found.name == "step_00000002" and not list((run_dir / "checkpoints").glob("*1")):
            break
        if raised is not None:  # an operation that only tidies up afterwards may fail without a word
            assert isinstance(raised, CheckpointError) and "No space left on device" in str(raised)
            assert "\n" not in str(raised)
            assert not [p for p in (run_dir / "checkpoints").glob("*.tmp") if not p.is_symlink()]
    assert number > 12


def test_file_size_limit_hits_both_writers(tmp_path: Path, in_child: Callable[[Callable[[], None]], int]) -> None:
    """The real errors of safetensors and torch.save when the system refuses to write, by RLIMIT_FSIZE."""

    def save_with_limits() -> None:
        keeper = Checkpointer(tmp_path, 0)
        model = nn.Linear(200, 200)
        optimizer = adamw(model)
        keeper.write(Contents.of(1, model, objects(optimizer), {}))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for step, limit in [(2, 100_000), (3, 200_000)]:  # the model takes 160 kB, its moments 320 kB
            if step == 3:
                model(torch.ones(1, 200)).sum().backward()
                optimizer.step()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError, match="File too large"):
                keeper.write(Contents.of(step, model, objects(optimizer), {}))
            assert keeper.find_latest() == keeper.folder / "step_00000001"
            assert sorted(p.name for p in keeper.folder.iterdir()) == ["latest", "step_00000001"]

    assert os.waitpid(in_child(save_with_limits), 0)[1] == 0


def test_an_error_of_ours_is_not_called_a_full_disk(tmp_path: Path) -> None:
    model = Net()
    keeper, strange = Checkpointer(tmp_path, 0), Pool(1.0)
    with pytest.raises(TypeError):
        keeper.write(Contents.of(1, model, saved_adamw(model), {"not json": object()}))
    strange.names = lambda: None  # type: ignore[assignment]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        keeper.write(Contents.of(1, model, {"action/pool": strange}, {}))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def constant_net(value: int) -> tuple[nn.Module, dict[str, Stateful]]:
    """A model and optimizer of about 1 MB in which everything is `value`."""
    model = nn.Linear(300, 300)
    optimizer = adamw(model)
    for p in model.parameters():
        nn.init.constant_(p, value)
        optimizer.state[p] = {key: torch.full_like(p, value) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p]["step"] = torch.tensor(float(value))
    return model, objects(optimizer)


def test_sigkill_during_saves(tmp_path: Path, in_child: Callable[[Callable[[], None]], int], lines: list[str]) -> None:
    """Children that do nothing but save are killed at seeded random times; what they leave is whole."""
    keeper, delays = Checkpointer(tmp_path, 2), random.Random(0)
    num_mid_save = newest = 0
    constant_net(0)  # imports what torch imports late, once for all children
    for _ in range(20):
        reading, writing = os.pipe()

        def save_forever(first: int = newest + 1, ready: int = writing) -> None:
            for step in range(first, 10**6):
                keeper.write(Contents.of(step, *constant_net(step), {"value": step}))
                os.write(ready, b".")

        child = in_child(save_forever)
        assert os.read(reading, 1) == b"."
        time.sleep(0.03 * delays.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        num_mid_save += any(not p.is_symlink() for p in keeper.folder.glob("*.tmp"))

        path = keeper.find_latest()
        assert path is not None and not lines
        model, loaded = constant_net(0)
        state = keeper.load(path, model, loaded)
        assert state["step"] == state["value"] > newest
        newest = state["step"]
        assert all(bool((p == newest).all()) for p in model.parameters())
        assert isinstance(loaded["optimizer"], OptimizerState)
        assert all(bool((tensor == newest).all()) for tensor in flat_state(loaded["optimizer"].optimizer).values())
    assert num_mid_save >= 3, "most kills are meant to hit a save"


def saved_steps(folder: Path, *steps: int) -> Checkpointer:
    keeper = Checkpointer(folder, 0)
    for step in steps:
        keeper.write(Contents.of(step, *constant_net(step), {"value": step}))
    return keeper


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    """Otherwise one more damaged file would leave a run of keep_last=2 with nothing to go on from."""
    saved_steps(tmp_path, 4, 7)
    (tmp_path / "checkpoints" / "step_00000007" / "model.safetensors").write_bytes(b"half")
    keeper = Checkpointer(tmp_path, 2)
    assert keeper.find_latest_step()[1] == 4
    keeper.write(Contents.of(8, *constant_net(8), {"value": 8}))
    assert sorted(path.name for path in keeper.folder.glob("step_*")) == ["step_00000004", "step_00000008"]
    (keeper.folder / "step_00000008" / "state.json").unlink()
    assert Checkpointer(tmp_path, 2).find_latest_step()[1] == 4


def test_what_killed_starts_left_is_deleted_but_not_what_a_run_goes_on_from(tmp_path: Path) -> None:
    keeper = saved_steps(tmp_path, 4, 8)
    (keeper.folder / "step_00000008").rename(keeper.folder / "step_00000008.old")
    shutil.copytree(keeper.find(4), keeper.folder / "step_00000012.tmp")
    shutil.copytree(keeper.find(4), keeper.folder / "step_00000004.old")
    continued, step = keeper.find_latest_step()
    assert continued is not None and continued.name == "step_00000008.old" and step == 8
    keeper.clean(continued)
    assert sorted(path.name for path in keeper.folder.glob("step_*")) == ["step_00000004", "step_00000008.old"]


def test_a_damaged_checkpoint_that_was_written_again_counts(tmp_path: Path) -> None:
    saved_steps(tmp_path, 4, 8)
    (tmp_path / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"half")
    keeper = Checkpointer(tmp_path, 2)
    assert keeper.find_latest_step()[1] == 4
    for step in (8, 12):
        keeper.write(Contents.of(step, *constant_net(step), {"value": step}))
    assert sorted(path.name for path in keeper.folder.glob("step_*")) == ["step_00000008", "step_00000012"]
    assert keeper.find(8).name == "step_00000008"


def test_find_gives_the_step_that_was_asked_for(tmp_path: Path) -> None:
    keeper = saved_steps(tmp_path, 5, 40, 300)
    for step in (40, 5, 300):
        path = keeper.find(step)
        assert path.parent == keeper.folder and path.name == f"step_{step:08d}"
        assert json.loads((path / "state.json").read_text())["value"] == step


def test_find_lists_what_there_is(tmp_path: Path) -> None:
    keeper = saved_steps(tmp_path, 5, 40, 300)
    shutil.copytree(keeper.find(300), keeper.folder / "step_00000400.tmp")  # half a save is none
    for step in (4, 400, -1):
        with pytest.raises(CheckpointError, match=f"no checkpoint of step {step}; there are: 5, 40, 300$"):
            keeper.find(step)
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        (tmp_path / "empty" / "checkpoints").mkdir(parents=True, exist_ok=True)
        with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: none at all"):
            Checkpointer(folder, 0).find(5)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
def test_find_refuses_a_damaged_step_and_no_other(file: str, tmp_path: Path) -> None:
    keeper = saved_steps(tmp_path, 1, 2)
    damaged = keeper.find(2) / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content if file != "manifest.json" else b"{")
    with pytest.raises(CheckpointError, match=rf"step_00000002 is damaged \({file}.*choose another step"):
        keeper.find(2)
    assert keeper.find(1).name == "step_00000001"
    damaged.unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        keeper.find(2)


def test_find_takes_the_replacement_or_what_was_replaced(tmp_path: Path) -> None:
    """A save of the same step leaves `.old` if it is killed between its two renames, or before it cleans up."""
    keeper = saved_steps(tmp_path, 1)
    path = keeper.find(1)
    old = path.with_name(f"{path.name}.old")
    shutil.copytree(path, old)
    (old / "manifest.json").unlink()
    assert keeper.find(1) == path
    shutil.rmtree(old)
    path.rename(old)
    assert keeper.find(1) == old
