"""Weights pass through little memory, and lie where Hugging Face's libraries look for them."""

import json
import os
import resource
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sltrain.formats.weights import WeightFiles, write_weights


def some_tensors(count: int = 7) -> dict[str, Tensor]:
    """Tensors of 400 bytes of several dtypes, names not in alphabetical order."""
    kinds = [torch.float32, torch.int32, torch.bfloat16, torch.uint16, torch.uint8]
    tensors = {}
    for i in range(count):
        kind = kinds[i % len(kinds)]
        values = torch.arange(400 // kind.itemsize) % 251 + i
        tensors[f"t{(11 * i) % count}"] = values.to(kind)
    return tensors


def on_meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def test_one_file_up_to_the_limit(tmp_path: Path) -> None:
    tensors = some_tensors()
    assert write_weights(tmp_path, on_meta(tensors), tensors.__getitem__, max_shard_bytes=2800) == 2800
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys() and all(same(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = some_tensors()
    assert write_weights(tmp_path, on_meta(tensors), tensors.__getitem__, max_shard_bytes=2799) == 2800
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model.safetensors.index.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert index["weight_map"].keys() == tensors.keys()
    shards = {name: load_file(tmp_path / name) for name in names}
    assert [len(shard) for shard in shards.values()] == [6, 1]
    assert {name for shard in shards.values() for name in shard} == tensors.keys()
    for name, file in index["weight_map"].items():
        assert same(shards[file][name], tensors[name])
    assert index["weight_map"][list(tensors)[-1]] == names[1]  # in the order given


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10), "big": torch.ones(100), "b": torch.ones(10)}
    write_weights(tmp_path, tensors, tensors.__getitem__, max_shard_bytes=100)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(where.values()).count(where["big"]) == 1
    assert all(same(WeightFiles(tmp_path).read(name), tensors[name]) for name in tensors)


def test_at_most_one_shard_is_held(tmp_path: Path) -> None:
    tensors = some_tensors(20)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def make(name: str) -> Tensor:
        nonlocal most
        tensor = tensors[name].clone()
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    write_weights(tmp_path, on_meta(tensors), make, max_shard_bytes=1200)
    assert len(alive) == 20 and most == 3
    assert len(list(tmp_path.glob("*.safetensors"))) == 7


def test_a_transposed_or_shared_tensor_is_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"t": base.t(), "same": base, "row": base[1]}
    write_weights(tmp_path, tensors, lambda name: tensors[name].clone() if name != "t" else tensors["t"])
    found = load_file(tmp_path / "model.safetensors")
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_tensors_of_one_storage_are_several_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    views = {"a": base[:6], "b": base[6:], "whole": base}
    write_weights(tmp_path, views, lambda name: views[name].clone(), max_shard_bytes=30)
    found = WeightFiles(tmp_path)
    assert set(found.names()) == set(views) and all(same(found.read(name), views[name]) for name in views)


@pytest.mark.parametrize("max_shard_bytes", [100, 10**9])
def test_files_are_as_readable_as_their_folder(max_shard_bytes: int, tmp_path: Path) -> None:
    for mode, wanted in {0o755: 0o644, 0o750: 0o640, 0o700: 0o600, 0o775: 0o664}.items():
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        tensors = {"a": torch.ones(20), "b": torch.ones(20)}
        write_weights(folder, tensors, tensors.__getitem__, max_shard_bytes)
        assert {path.stat().st_mode & 0o777 for path in folder.glob("*.safetensors")} == {wanted}


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs POSIX")
def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(5000)}
    with pytest.raises(OSError, match=r"model\.safetensors: "):
        write_weights(tmp_path / "gone", tensors, tensors.__getitem__)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: .*File too large"):
            write_weights(tmp_path, tensors, tensors.__getitem__)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# ---- reading


def test_reading_what_was_written_in_shards(tmp_path: Path) -> None:
    tensors = some_tensors(9)
    write_weights(tmp_path, on_meta(tensors), tensors.__getitem__, max_shard_bytes=900)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    files = WeightFiles(tmp_path)
    assert set(files.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert same(files.read(name), tensor)
        assert files.shape(name) == tuple(tensor.shape) and files.dtype(name) == tensor.dtype
    for ask in (files.read, files.shape):
        with pytest.raises(ValueError, match="holds no tensor t99"):
            ask("t99")


def test_filling_a_module(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    source.register_buffer("positions", torch.tensor([3, 1, 2], dtype=torch.int32))
    write_weights(tmp_path, source.state_dict(), lambda name: source.state_dict()[name])
    for dtype in (None, torch.bfloat16):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
            model.register_buffer("positions", torch.empty(3, dtype=torch.int32))
        model[1].bias.requires_grad_(False)
        WeightFiles(tmp_path).fill(model, dtype=dtype)
        for (name, ours), theirs in zip(model.state_dict().items(), source.state_dict().values(), strict=True):
            assert same(ours, theirs if name == "positions" else theirs.to(dtype or torch.float32))
        assert isinstance(model[0].weight, nn.Parameter) and model[0].weight.requires_grad
        assert not model[1].bias.requires_grad


def test_filling_a_part_by_its_prefix(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    write_weights(tmp_path, source.state_dict(), lambda name: source.state_dict()[name])
    part = nn.Linear(4, 2)
    WeightFiles(tmp_path).fill(part, "1.")
    assert same(part.weight.detach(), source[1].weight.detach())
    with pytest.raises(ValueError, match=r"0\.weight is \(4, 3\), the model needs \(2, 4\)"):
        WeightFiles(tmp_path).fill(part, "0.")
    assert same(part.weight.detach(), source[1].weight.detach())  # and it is untouched
    with pytest.raises(ValueError, match=r"holds no tensor 2\.weight"):
        WeightFiles(tmp_path).fill(part, "2.")


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    source = nn.Linear(3, 4)
    write_weights(tmp_path, source.state_dict(), lambda name: source.state_dict()[name])
    before = (tmp_path / "model.safetensors").read_bytes()
    model, second = nn.Linear(3, 4), nn.Linear(3, 4)
    WeightFiles(tmp_path).fill(model)
    WeightFiles(tmp_path).fill(second)
    with torch.no_grad():
        model.weight.zero_()
        model.bias += 1
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert same(second.weight.detach(), source.weight.detach()) and same(second.bias.detach(), source.bias.detach())


def test_check_wants_exactly_the_models_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    state = model.state_dict()
    for change, words in {
        "nothing": None,
        "missing": "holds no tensor 0.bias",
        "more": "holds 1.weight, which the model does not have",
        "shape": r"0.bias is \(5,\), the model needs \(4,\)",
    }.items():
        folder = tmp_path / change
        folder.mkdir()
        tensors = dict(state)
        if change == "missing":
            del tensors["0.bias"]
        if change == "more":
            tensors["1.weight"] = torch.ones(1)
        if change == "shape":
            tensors["0.bias"] = torch.ones(5)
        save_file(tensors, folder / "model.safetensors")
        if words is None:
            WeightFiles(folder).check(model)
        else:
            with pytest.raises(ValueError, match=words):
                WeightFiles(folder).check(model)


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}',
     '{"weight_map": {"a": 1}}'],
)  # fmt: skip
def test_a_damaged_index(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"garbage that is no header", "half"])
def test_damaged_weights_are_named(content: bytes | str | None, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    if content is not None:
        save_file({"a": torch.ones(100)}, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(OSError, match=r"model\.safetensors: ") as caught:
        WeightFiles(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_weights(tmp_path, tensors, tensors.__getitem__, max_shard_bytes=1000)
    lost = tmp_path / "model-00002-of-00004.safetensors"
    lost.unlink()
    with pytest.raises(OSError, match=lost.name):
        WeightFiles(tmp_path)
