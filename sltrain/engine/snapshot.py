"""The values of one step in host memory, so that training may go on while they are written.

The memory is kept from one copy to the next: a first copy also pays for pages that the system must find, and on a GPU
for pinning them, which lets its copy engine work at the speed of the bus (torch's allocator of pinned memory rounds
each tensor up to a power of two). A copy takes as much memory as what it copies: weights, positions, averages and the
optimizer's state. What rank 0 gathered from shards is a copy already: it is handed over, and found anew for each save.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sltrain.engine.checkpoint_files import Contents, Place
from sltrain.engine.memory import bytes_of


class HostCopy:
    """Copies contents into memory of its own. Each copy overwrites the one before."""

    def __init__(self) -> None:
        self._held: dict[Place, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are kept for the next copy."""
        return bytes_of(self._held.values())

    def take(self, contents: Contents) -> Contents:
        """A copy whose tensors are on the CPU; what is `fresh` is handed over. What several places share is copied once
        and shared again; strides and dtypes are kept. Raises torch's error if memory is short."""
        earlier, self._held = self._held, {}
        copies: dict[int, Any] = {}  # by the id of the original
        gpus = set()
        for place, tensor in _tensors({"model": contents.tensors, **contents.objects}):
            if id(tensor) in contents.fresh:
                copies[id(tensor)] = tensor
            elif id(tensor) not in copies:
                copies[id(tensor)] = self._copy(tensor.detach(), place, earlier.pop(place, None))
                gpus |= {tensor.device} if tensor.is_cuda else set()
        for gpu in gpus:
            torch.cuda.current_stream(gpu).synchronize()
        tensors = {name: copies[id(tensor)] for name, tensor in contents.tensors.items()}
        return replace(contents, tensors=tensors, objects=copy.deepcopy(contents.objects, copies))

    def free(self) -> None:
        """Give the memory back; the next copy finds its own."""
        self._held = {}

    def _copy(self, tensor: Tensor, place: Place, memory: Tensor | None) -> Tensor:
        """A copy in `memory`, if that has the tensor's form; from a GPU it may still be under way."""
        if type(tensor) is not Tensor:  # a subclass may not be filled in place
            return tensor.to("cpu", copy=True)
        if memory is None or _form(memory) != _form(tensor):
            memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._held[place] = memory
        return memory.copy_(tensor, non_blocking=tensor.is_cuda)


def _tensors(value: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The tensors in nested dicts, lists and tuples, and where they are."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors(inner, (*place, i))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share if one's memory can hold the other's values as they lie."""
    return tensor.shape, tensor.stride(), tensor.dtype
