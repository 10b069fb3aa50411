"""The files of a checkpoint: a model's tensors in safetensors, the state of any other object by torch.save.

Tensors are read one by one into the memory that the model already holds, and never cast. Other files are loaded with
weights_only=True: code in them is not run.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sltrain.engine.actions import Stateful

ADVICE = "Use the settings it was made with, or another run_dir."
SAFETENSORS_TYPES = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "BOOL": "bool"}  # before the digits


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or belongs to another model. The message is for the user."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers, however they are nested."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def save_model(path: Path, model: nn.Module | Mapping[str, Tensor]) -> None:
    """Write parameters and persistent buffers, a tied one under its first name only; or these tensors."""
    named = named_tensors(model) if isinstance(model, nn.Module) else model
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_model(path: Path, model: nn.Module) -> None:
    """Fill the model from the file. Raises CheckpointError when a name, shape or dtype differs; the model is then
    untouched."""
    expected = named_tensors(model)
    assert not any(tensor.is_meta for tensor in expected.values()), "give the model memory (to_empty) before loading"
    with safe_open(path, framework="pt") as file:  # maps the file: one tensor at a time is in memory
        found = {}
        for name in file.keys():
            part = file.get_slice(name)
            letters = part.get_dtype().rstrip("0123456789")
            dtype = part.get_dtype().replace(letters, SAFETENSORS_TYPES.get(letters, letters))
            found[name] = f"{dtype} {tuple(part.get_shape())}"
        _refuse_differences(path, expected, found)
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(file.get_tensor(name))


def save_object(path: Path, stateful: Stateful) -> None:
    """Write the object's state, without a copy of its tensors."""
    with open(path, "wb") as file:
        torch.save(stateful.state_dict(), file)


def load_object(path: Path, stateful: Stateful, is_on_cpu: bool) -> None:
    """Load the state in the file into the object. Raises CheckpointError for the state of another object.

    On its way to a GPU the file is mapped, so that the ranks of a machine do not each hold a copy. On the CPU the
    loaded tensors may become the state, which must not depend on a file that keep_last deletes.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=not is_on_cpu)
    try:
        stateful.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint of another {path.stem}: {error} ({path}). {ADVICE}") from error


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied one under its first name only."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name.replace("_orig_mod.", "")] = tensor.detach()  # layers may be compiled one by one
    return named


def _refuse_differences(path: Path, tensors: Mapping[str, Tensor], found: Mapping[str, str]) -> None:
    """Raise CheckpointError, naming the first, if tensors differ from `found`: dtypes and shapes in words."""
    expected = {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if names:
        want, have = (described.get(names[0], "no such tensor") for described in (expected, found))
        rest = f" ({len(names) - 1} more tensors differ)" if len(names) > 1 else ""
        raise CheckpointError(
            f"checkpoint of another model: {names[0]}: this run expects {want}, {path} has {have}{rest}. {ADVICE}"
        )
