"""Owners: of a model in shards, the processes that update single modules as a whole.

Every module has one owner, so that all own about as many elements; the state of its parameters lies there alone. In a
turn every process has one of its modules whole: the others send their rows of weight and gradient (gather), and get
their rows of the new weight back (scatter). What updates them is optim/whole_tensors.py's.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltrain.engine.shards import Shard, gather_rows, scatter_rows

T = TypeVar("T")


class Owners:
    """The owners of parameters among the processes of `group`.

    Args:
        shards: of every parameter of the model what this process holds, by name.
        names: the parameters that are updated as a whole.
        group: the processes that hold one copy of the model.
    """

    def __init__(self, shards: Mapping[str, Shard], names: Sequence[str], group: dist.ProcessGroup) -> None:
        self._shards, self._group = shards, group
        self._position, num_owners = dist.get_rank(group), dist.get_world_size(group)
        members = by_module((name, name) for name in names)
        sizes = {module: sum(shards[name].parameter.numel() for name in own) for module, own in members.items()}
        self._modules = [list[list[str]]() for _ in range(num_owners)]  # each's own, as the names of parameters
        self.of: dict[str, int] = {}  # parameter -> position of its owner
        for module, owner in deal(sizes, num_owners).items():
            self._modules[owner].append(members[module])
            self.of |= dict.fromkeys(members[module], owner)
        self._mine = {
            name: without_memory(shards[name].parameter) for name, owner in self.of.items() if owner == self._position
        }
        self.labels: dict[str, Any] = {}  # class and groups of the optimizer of one process

    def updated_here(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer of this process updates, in the model's order: its rows of parameters without an owner,
        and those that it owns, which have memory in a turn."""
        return [
            (name, self._mine.get(name, shard.local))
            for name, shard in self._shards.items()
            if self.of.get(name, self._position) == self._position
        ]

    def turns(self) -> list[AbstractContextManager[None]]:
        """The turns of an update by the present gradients, for optim/whole_tensors.py."""
        has_gradient = {name for name in self.of if self._shards[name].local.grad is not None}
        parts = [[[n for n in names if n in has_gradient] for names in own] for own in self._modules]
        rounds = itertools.zip_longest(*(filter(None, part) for part in parts), fillvalue=[])
        return [self._turn([name for names in together for name in names]) for together in rounds]

    @contextlib.contextmanager
    def _turn(self, taken: Sequence[str]) -> Iterator[None]:
        for name in taken:
            local, where = self._shards[name].local, self._where(name)
            assert local.grad is not None
            weight, grad = gather_rows(local, *where), gather_rows(local.grad, *where)
            local.grad = None
            if weight is not None:
                self._mine[name].data, self._mine[name].grad = weight, grad
        yield
        for name in taken:
            mine = self._mine.get(name)
            scatter_rows(None if mine is None else mine.data, self._shards[name].local.data, *self._where(name))
            if mine is not None:
                mine.data, mine.grad = without_memory(mine).data, None

    def _where(self, name: str) -> tuple[int, dist.ProcessGroup, int]:
        return len(self._shards[name].parameter), self._group, self.of[name]

    def cut(self, saved: Mapping[str, Any], class_here: str) -> dict[str, Any]:
        """Of an optimizer's whole state that which this process keeps, rows uncut; its class is called `class_here`
        where members may be missing."""
        names = {name for name, _ in self.updated_here()}
        groups = [{**group, "names": [name for name in group["names"] if name in names]} for group in saved["groups"]]
        return {
            "class": class_here if saved["class"] == self.labels["class"] else saved["class"],
            "groups": [group for group in groups if group["names"]],
            "state": {name: state for name, state in saved["state"].items() if name in names},
        }

    def to_main(self, name: str, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """At position 0 the state that the owner of a parameter has of it, elsewhere nothing of use."""
        owner = self.of[name]
        if owner == 0:
            return state
        here = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in (state or {}).items()}
        everyones: list[Any] | None = [None] * dist.get_world_size(self._group) if self._position == 0 else None
        dist.gather_object(here, everyones, group=self._group, group_dst=0)
        return None if everyones is None else everyones[owner]


def by_module(named: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """What belongs to parameters of these names, of each module together."""
    members: dict[str, list[T]] = {}
    for name, each in named:
        members.setdefault(name.rpartition(".")[0], []).append(each)
    return members


def deal(sizes: Mapping[str, int], num_owners: int) -> dict[str, int]:
    """The owner of each module of so many elements, the largest modules first: each goes to who has least."""
    loads, owners = [0] * num_owners, dict[str, int]()
    for module in sorted(sizes, key=lambda module: -sizes[module]):
        owners[module] = loads.index(min(loads))
        loads[owners[module]] += sizes[module]
    return owners


def without_memory(like: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, dtype and device, all of whose elements are one number."""
    one = torch.zeros(1, dtype=like.dtype, device=like.device)
    return nn.Parameter(one.expand(like.shape), like.requires_grad)
