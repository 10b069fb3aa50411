"""The files of a checkpoint: a model's tensors in safetensors, the state of any other object by torch.save.

`Contents` is what they will hold, gathered without a copy. Tensors are read one by one into the memory that the model
already holds, and never cast. Other files are loaded with weights_only=True: code in them is not run.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Contents:
    """What the checkpoint of one step holds. Its tensors may be those that are trained, which must then not change
    before it is written; snapshot.py copies them."""

    step: int  # updates done
    tensors: dict[str, Tensor]  # parameters and persistent buffers by name, a tied one under its first name only
    objects: dict[str, dict[str, Any]]  # the states of everything else, by name
    state: str  # JSON, with "step"

    @classmethod
    def of(
        cls,
        step: int,
        model: nn.Module | Mapping[str, Tensor],
        objects: Mapping[str, Stateful],
        state: Mapping[str, Any],
    ) -> "Contents":
        """The present values, not copied: see Checkpointer.save."""
        states = {name: stateful.state_dict() for name, stateful in objects.items()}
        tensors = named_tensors(model) if isinstance(model, nn.Module) else dict(model)
        return cls(step, tensors, states, json.dumps({**state, "step": step}))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's tensors by name."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def all_rows(tensor: Tensor) -> tuple[Tensor, None]:
    """All of a tensor, and all of its rows."""
    return tensor, None


def load_model(path: Path, model: nn.Module, part: Callable[[Tensor], tuple[Tensor, slice | None]] = all_rows) -> None:
    """Fill the model from the file. Raises CheckpointError when a name, shape or dtype differs; the model is then
    untouched. `part(tensor)` is what to fill of it, and with which rows of the one in the file; None: all."""
    expected = named_tensors(model)
    assert not any(tensor.is_meta for tensor in expected.values()), "give the model memory (to_empty) before loading"
    with safe_open(path, framework="pt") as file:  # maps the file: one tensor at a time is in memory
        found = {}
        for name in file.keys():
            stored = file.get_slice(name)
            letters = stored.get_dtype().rstrip("0123456789")
            dtype = stored.get_dtype().replace(letters, SAFETENSORS_TYPES.get(letters, letters))
            found[name] = f"{dtype} {tuple(stored.get_shape())}"
        _refuse_differences(path, expected, found)
        with torch.no_grad():
            for name, tensor in expected.items():
                here, rows = part(tensor)
                here.copy_(file.get_tensor(name) if rows is None else file.get_slice(name)[rows])


def save_object(path: Path, state: dict[str, Any]) -> None:
    """Write an object's state, without a copy of its tensors."""
    with open(path, "wb") as file:
        torch.save(state, file)


def load_object(path: Path, stateful: Stateful, is_on_cpu: bool) -> None:
    """Load the state in the file into the object. Raises CheckpointError for the state of another object.

    On its way to a GPU the file is mapped, so that the ranks of a machine do not each hold a copy. On the CPU the
    loaded tensors may become the state, which must not depend on a file that keep_last deletes; unless the object says
    that it `copies` them.
    """
    is_copied = getattr(stateful, "copies", False)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_copied or not is_on_cpu)
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
