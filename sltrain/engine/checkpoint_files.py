"""The files of a checkpoint: a model's tensors in safetensors, the state of any other object by torch.save.

Tensors are read one by one into the memory that the model already holds, and nothing is ever cast. Other files are
loaded with weights_only=True: code in them is not run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sltrain.engine.actions import Stateful

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ADVICE = "Give the settings it was made with, or another run_dir."


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or belongs to another model. The message is for the user."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers, however they are nested."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def save_model(path: Path, model: nn.Module) -> None:
    """Write parameters and persistent buffers, a tied one under its first name only."""
    tensors = {name: tensor.contiguous() for name, tensor in _named_tensors(model).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_model(path: Path, model: nn.Module) -> None:
    """Fill the model from the file. Raises CheckpointError when a name, shape or dtype differs; the model is then
    untouched."""
    expected = _named_tensors(model)
    assert not any(tensor.is_meta for tensor in expected.values()), "give the model memory (to_empty) before loading"
    with safe_open(path, framework="pt") as file:  # maps the file: one tensor at a time is in memory
        found = {}
        for name in file.keys():
            part = file.get_slice(name)
            dtype = part.get_dtype()
            found[name] = _describe(SAFETENSORS_DTYPES.get(dtype, dtype), part.get_shape())
        wanted = {name: _describe(tensor.dtype, tensor.shape) for name, tensor in expected.items()}
        _refuse_differences(path, wanted, found)
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(file.get_tensor(name))


def save_object(path: Path, stateful: Stateful) -> None:
    """Write the object's state, without a copy of its tensors."""
    with open(path, "wb") as file:
        torch.save(stateful.state_dict(), file)


def load_object(path: Path, stateful: Stateful, is_on_cpu: bool) -> None:
    """Give the object the state in the file.

    A mapped file keeps the ranks of one machine from each holding a copy on its way to the GPU. On the CPU the loaded
    tensors may become the state, and must not depend on a file that keep_last deletes.

    Raises CheckpointError for the state of another object.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=not is_on_cpu)
    try:
        stateful.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint of another {path.stem}: {error} ({path}). {ADVICE}") from error


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied one under its first name only."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name.replace("_orig_mod.", "")] = tensor.detach()  # layers may be compiled one by one
    return named


def _describe(dtype: object, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _refuse_differences(path: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """CheckpointError naming the first tensor that differs, if one does. Values are dtypes and shapes in words."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if names:
        want, have = (tensors.get(names[0], "no such tensor") for tensors in (expected, found))
        rest = f" ({len(names) - 1} more tensors differ)" if len(names) > 1 else ""
        raise CheckpointError(
            f"checkpoint of another model: {names[0]}: this run expects {want}, {path} has {have}{rest}. {ADVICE}"
        )
