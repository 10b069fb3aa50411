"""The files of a checkpoint: a model's tensors in safetensors, the state of any other object by torch.save. Those of a
checkpoint to which every process writes its share: sharded_files.py.

`Contents` is what they will hold, gathered without a copy. Tensors are read one by one into the memory that the model
already holds, and never cast. Other files are loaded with weights_only=True: code in them is not run.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sltrain.engine.actions import Stateful

METADATA_FILE = ".metadata"  # of shares, see sharded_files.py
ADVICE = "Use the settings it was made with, or another run_dir."
Place = tuple[Any, ...]  # of a tensor in the contents: keys and positions from the outside to the inside
Read = Callable[[slice | None], Tensor]  # some rows of a tensor, as a new one; None: all
Part = Callable[[Tensor], tuple[Tensor, slice | None]]  # of a tensor: what to fill, with which rows; None: all
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
    before it is written; snapshot.py copies them, unless they are `fresh`."""

    step: int  # updates done
    tensors: dict[str, Tensor]  # parameters and persistent buffers by name, a tied one under its first name only
    objects: dict[str, dict[str, Any]]  # the states of everything else, by name
    state: str  # JSON, with "step"
    # Of a share: which tensors are only rows, the first of them and how many there are on all processes; None: rank 0
    # has everything
    cuts: dict[Place, tuple[int, int]] | None = None
    fresh: Collection[int] = ()  # ids of tensors that were made for these contents: nobody will change them

    @classmethod
    def of(cls, step: int, model: nn.Module, objects: Mapping[str, Stateful], state: Mapping[str, Any]) -> "Contents":
        """The present values, not copied.

        Args:
            model: may be wrapped in DDP and torch.compile.
            objects: everything else with a state, by name: the optimizer, what actions keep.
            state: JSON data (so its dict keys are strings); `step` is added.
        """
        states = {name: stateful.state_dict() for name, stateful in objects.items()}
        return cls(step, named_tensors(model), states, json.dumps({**state, "step": step}))


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, to be read when it is needed."""

    shape: tuple[int, ...]
    dtype: str  # as in torch.float32
    read: Read


def taken(tensor: Tensor | Stored, rows: slice | None) -> Tensor:
    """Some rows of a tensor, as a new one; None: all."""
    return tensor.read(rows) if isinstance(tensor, Stored) else tensor[rows or ...].clone()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's tensors by name."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def all_rows(tensor: Tensor) -> tuple[Tensor, None]:
    """All of a tensor, and all of its rows."""
    return tensor, None


def load_model(path: Path, model: nn.Module, part: Part = all_rows) -> None:
    """Fill the model from the file: see `fill_model`."""
    with safe_open(path, framework="pt") as file:  # maps the file: one tensor at a time is in memory

        def stored(name: str) -> Stored:
            header = file.get_slice(name)
            letters = header.get_dtype().rstrip("0123456789")
            dtype = header.get_dtype().replace(letters, SAFETENSORS_TYPES.get(letters, letters))

            def read(rows: slice | None) -> Tensor:
                tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
                return tensor

            return Stored(tuple(header.get_shape()), dtype, read)

        fill_model(path, model, {name: stored(name) for name in file.keys()}, part)


def fill_model(path: Path, model: nn.Module, found: Mapping[str, Stored], part: Part = all_rows) -> None:
    """Fill the model from what was found in `path`. Raises CheckpointError when a name, shape or dtype differs; the
    model is then untouched."""
    expected = named_tensors(model)
    assert not any(tensor.is_meta for tensor in expected.values()), "give the model memory (to_empty) before loading"
    _refuse_differences(path, expected, {name: f"{each.dtype} {each.shape}" for name, each in found.items()})
    with torch.no_grad():
        for name, tensor in expected.items():
            here, rows = part(tensor)
            here.copy_(found[name].read(rows))


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
    give_state(path, path.stem, stateful, state)


def give_state(path: Path, name: str, stateful: Stateful, state: dict[str, Any]) -> None:
    """Give an object the state that was found in `path`. Raises CheckpointError for that of another object."""
    try:
        stateful.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint of another {name}: {error} ({path}). {ADVICE}") from error


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


def refuse_other_objects(path: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise CheckpointError, naming it, for an object whose state only the run or only the checkpoint has."""
    wanted = set(wanted)
    for name in sorted(wanted ^ set(found)):
        what = f"has no {name}, which this run needs" if name in wanted else f"has {name}, unknown to this run"
        raise CheckpointError(f"checkpoint {path} {what}. {ADVICE}")
