"""parallel=fsdp and hsdp: every process holds a share of each tensor, by PyTorch's fully_shard (FSDP2).

Each decoder layer is a unit, and so is what lies outside of them (embedding, head, last norm). A unit is gathered
before its forward pass, dropped after it, and gathered again for its backward (Zhao et al., arXiv 2304.11277):

    P parameters of e bytes, n shards, L layers        held by a process
    between updates                                    e P / n, optimizer state / n, indices whole
    in forward and backward                            and the unit of embedding and head, and two decoder layers

A tensor is cut along its first dimension into n parts of ceil(rows / n) rows, so the last ones may be shorter or empty.
The optimizer gets this process's part as a plain parameter that shares its memory (`named_parameters`): element-wise
rules need no more, and know nothing of shards. Others get whole tensors, each on the process that owns its module
(owners.py).

A new model gets its values unit by unit: each process draws a whole unit by the seed, keeps its part and drops the
rest. No process ever holds the whole model, and the values are those of one process, bit for bit: of rank 0, which
sends its unit, as a start by a factorization may differ between machines. Indices of S are drawn by every process and
never sent; a hash over processes says at the start whether they are equal.

hsdp (arXiv 2304.11277, section 3.2.2): `replicas` groups of processes, each with all of the model in shards; gradients
are averaged inside a group first, then over groups.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint_files import Contents, Place, Stored, taken
from sltrain.engine.distributed import Ranks
from sltrain.engine.owners import Owners, without_memory
from sltrain.engine.shards import Shard, gather_rows, rows_of
from sltrain.engine.strategy import Strategy

OPTIMIZER = "optimizer"  # its name among the objects of a checkpoint


@dataclass(frozen=True)
class Settings:
    """How a model is cut and computed with."""

    replicas: int = 1  # copies of the model; 1: fsdp, more: hsdp
    param_dtype: torch.dtype | None = None  # of gathered weights; None: their own
    reduce_dtype: torch.dtype | None = None  # of gradients while they are averaged; None: their own
    reshard_after_forward: bool = True
    reduces_each_micro_batch: bool = True  # False: whole gradients are held until the last one
    saves_shares: bool = False  # every process writes its share of a checkpoint; False: rank 0 gathers and writes all


class Sharded(Strategy):
    """The strategy of shards. Raises ValueError if `replicas` does not divide the processes."""

    is_sharded = True

    def __init__(self, ranks: Ranks, settings: Settings) -> None:
        super().__init__(ranks)
        self.settings, self.name = settings, "fsdp" if settings.replicas == 1 else "hsdp"
        self.num_shards = ranks.world_size // settings.replicas
        if self.num_shards * settings.replicas != ranks.world_size:
            raise ValueError(f"{ranks.world_size} processes are no multiple of {settings.replicas} replicas")
        sizes = (settings.replicas, self.num_shards)
        mesh = init_device_mesh(ranks.device.type, sizes, mesh_dim_names=("replica", "shard"))
        self._mesh = mesh["shard"] if settings.replicas == 1 else mesh
        self._group = mesh.get_group("shard")
        self._replica, self._position = divmod(ranks.rank, self.num_shards)
        self._shards: dict[str, Shard] = {}
        self._local: dict[nn.Parameter, nn.Parameter] = {}  # of a parameter of the model what is held here
        self.units: list[list[nn.Parameter]] = []  # trained parameters of the model, those together that are summed so
        self.owners: Owners | None = None  # of parameters that are updated as a whole, if there are such
        self.savers = ranks.beside() if settings.saves_shares else None

    # ---- building

    def shard(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        prepare: Callable[[Collection[nn.Module]], None] = lambda modules: None,
    ) -> None:
        policy = MixedPrecisionPolicy(self.settings.param_dtype, self.settings.reduce_dtype)
        how: dict[str, Any] = {"mesh": self._mesh, "mp_policy": policy}
        inside: set[nn.Module] = set()
        for unit in units:
            modules = set(unit.modules())
            inside.update(modules)
            prepare(modules)
            fully_shard(
                unit,
                reshard_after_forward=self.settings.reshard_after_forward,
                ignored_params=_empty_ones(unit),
                **how,
            )
        prepare(set(model.modules()) - inside)
        fully_shard(model, reshard_after_forward=False, ignored_params=_empty_ones(model), **how)  # backward follows
        self._shards = {
            name: Shard(p, nn.Parameter(self.part(p.detach())[0], p.requires_grad), isinstance(p, DTensor))
            for name, p in model.named_parameters()
        }
        self._local = {shard.parameter: shard.local for shard in self._shards.values()}
        unit_of = {p: number for number, unit in enumerate(units) for p in unit.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.units = [[p for p in trained if unit_of.get(p, len(units)) == n] for n in range(len(units) + 1)]

    def agree(self, model: nn.Module) -> None:
        """Raise ValueError, on all ranks, if a buffer differs between them: those of the others would be of another
        model. Nothing is sent."""
        digests = [(name, _digest(buffer)) for name, buffer in model.named_buffers()]
        together = hashlib.sha256(repr(digests).encode()).hexdigest()
        if len(set(self.ranks.gather(together))) == 1:
            return
        everyones = self.ranks.gather(digests)
        rank, name = next(
            (rank, name)
            for rank, others in enumerate(everyones)
            for (name, first), (_, other) in zip(everyones[0], others, strict=True)
            if first != other
        )
        self.ranks.refuse(
            f"{name} was drawn differently on rank 0 and rank {rank}; start all processes with the same version of"
            " torch on machines of one kind, or set parallel=ddp, which sends it"
        )

    def named_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, shard.local) for name, shard in self._shards.items()]

    def give_owners(self, names: Sequence[str]) -> Owners:
        """Let each of these parameters be updated as a whole, by one process."""
        self.owners = Owners(self._shards, [n for n in names if self._shards[n].is_cut], self._group)
        return self.owners

    def places(self) -> dict[str, tuple[int, int]]:
        """Of each parameter that is cut, the first element that is held here, and how many it has as a whole."""
        cut = ((name, shard.parameter) for name, shard in self._shards.items() if shard.is_cut)
        rows = ((name, p, rows_of(len(p), self._position, self.num_shards)) for name, p in cut)
        return {name: (own.start * (p.numel() // len(p)), p.numel()) for name, p, own in rows}

    def stand_ins(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the whole shapes, without memory."""
        return [(name, without_memory(shard.parameter)) for name, shard in self._shards.items()]

    # ---- an update

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, is_last: bool) -> Iterator[None]:
        cast(FSDPModule, wrapped).set_requires_gradient_sync(is_last or self.settings.reduces_each_micro_batch)
        yield

    def gradients(self, model: nn.Module) -> list[nn.Parameter]:
        return self.take(self._local)

    def take(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The same of these parameters of the model alone, which give up their gradients."""
        found = []
        for parameter in parameters:
            local, grad = self._local[parameter], parameter.grad
            local.grad = None if grad is None else self.part(grad)[0]
            parameter.grad = None
            if grad is not None:
                found.append(local)
        return found

    def whole_norms(self, norms: list[Tensor]) -> list[Tensor]:
        squares = torch.stack(norms).square()
        dist.all_reduce(squares, group=self._group)
        return list(squares.sqrt().unbind())

    def anywhere(self, flags: list[bool]) -> list[bool]:
        return [count > 0 for count in self.ranks.sum([int(flag) for flag in flags])]

    def after_forward(self, model: nn.Module) -> None:
        """Drop the units that are kept for the backward that did not come: embedding and head, or all of them."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def by_modules(self, model: nn.Module) -> Iterator[None]:
        """Layers are gathered as they are called; embedding and head from here on. Compiled ones are called as they
        are: here each call may have other shapes."""
        is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        cast(FSDPModule, model).unshard()
        try:
            with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext():
                yield
        finally:
            self.after_forward(model)

    # ---- whole tensors

    def part(self, tensor: Tensor) -> tuple[Tensor, slice | None]:
        if not isinstance(tensor, DTensor):
            return tensor, None
        return tensor.to_local(), rows_of(len(tensor), self._position, self.num_shards)

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        sharded = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if isinstance(parameter, DTensor)
        ]
        for owner, name, parameter in sharded:
            whole = gather_rows(self.part(parameter.detach())[0], len(parameter), self._group)
            assert whole is not None
            owner._parameters[name] = nn.Parameter(whole, requires_grad=False)
        try:
            yield
        finally:
            for owner, name, parameter in sharded:
                owner._parameters[name] = parameter

    def for_checkpoint(
        self, step: int, model: nn.Module, objects: Mapping[str, Stateful], state: Mapping[str, Any]
    ) -> Contents:
        """Tensor by tensor to the host memory of rank 0, which then holds all of them; or this process's share."""
        tensors, states, cuts, fresh = (self._whole if self.savers is None else self._share)(model, objects)
        return Contents(step, tensors, states, json.dumps({**state, "step": step}), cuts, fresh)

    def _whole(self, model: nn.Module, objects: Mapping[str, Stateful]) -> tuple[Any, Any, None, set[int]]:
        """Tensors, states, nothing, and the ids of what was gathered, as the fields of `Contents`."""
        tensors, states, fresh = {}, {}, set[int]()
        for name, tensor in model.state_dict(keep_vars=True).items():
            part, rows = self.part(tensor.detach())
            tensors[name] = part if rows is None else self._to_main(part, len(tensor), fresh)
        for name, stateful in objects.items():
            state = stateful.state_dict()
            is_optimizer = name == OPTIMIZER
            states[name] = (
                self._gathered_optimizer(state, fresh) if is_optimizer else self._gathered(state, None, fresh)
            )
        return tensors, states, None, fresh

    def _share(self, model: nn.Module, objects: Mapping[str, Stateful]) -> tuple[Any, Any, Any, tuple[()]]:
        """The same of what this process holds, and which rows of whole tensors these are. Nothing is sent."""
        tensors, states, cuts = {}, {}, {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensors[name], rows = self.part(tensor.detach())
            if rows is not None:
                cuts["model", name] = rows.start, len(tensor)
        for name, stateful in objects.items():
            state, owned = stateful.state_dict(), set[str]()
            if name == OPTIMIZER and self.owners is not None:
                state, owned = {**self.owners.labels, "state": state["state"]}, {*self.owners.of}
            cuts |= self._cuts(state, (name,), owned, None)
            states[name] = state
        return tensors, states, cuts, ()

    def _cuts(self, state: Any, place: Place, owned: set[str], shard: Shard | None) -> dict[Place, tuple[int, int]]:
        """Of each tensor in a state that `cut` would cut the first row here, and the number of all."""
        if isinstance(state, Mapping):
            found: dict[Place, tuple[int, int]] = {}
            for key, value in state.items():
                inner = None if key in owned else self._shards.get(key, shard)
                found |= self._cuts(value, (*place, key), owned, inner)
            return found
        if shard is None or not isinstance(state, Tensor) or not shard.is_cut or state.shape != shard.local.shape:
            return {}
        _, rows = self.part(shard.parameter.detach())
        return {} if rows is None else {place: (rows.start, len(shard.parameter))}

    def from_checkpoint(self, objects: Mapping[str, Stateful]) -> Mapping[str, Stateful]:
        return {name: Cut(stateful, self, name == OPTIMIZER) for name, stateful in objects.items()}

    def cut(self, state: Any, copies: dict[int, Tensor], shard: Shard | None = None) -> Any:
        """This process's part of a whole state: rows of each tensor of a parameter's shape, under that parameter's
        name. Tensors are copied or read, each once: `copies` has them by id."""
        if isinstance(state, Mapping):
            return {key: self.cut(value, copies, self._shards.get(key, shard)) for key, value in state.items()}
        if not isinstance(state, Tensor | Stored):
            return state
        if shard is not None and state.shape == shard.parameter.shape:
            return taken(state, self.part(shard.parameter.detach())[1])
        if id(state) not in copies:
            copies[id(state)] = taken(state, None)
        return copies[id(state)]

    def cut_optimizer(self, saved: Mapping[str, Any], class_here: str) -> dict[str, Any]:
        """The same of an optimizer's state; of parameters with an owner the whole state there, and none elsewhere."""
        copies: dict[int, Tensor] = {}
        if self.owners is None:
            return cast(dict[str, Any], self.cut(saved, copies))
        kept = self.owners.cut(saved, class_here)
        owned = {name: kept["state"].pop(name) for name in self.owners.of if name in kept["state"]}
        whole = {name: {key: self.cut(value, copies) for key, value in state.items()} for name, state in owned.items()}
        return {**kept, "state": {**self.cut(kept["state"], copies), **whole}}

    def _gathered_optimizer(self, state: Mapping[str, Any], fresh: set[int]) -> Any:
        """On rank 0 an optimizer's whole state, as one process would write it."""
        if self.owners is None:
            return self._gathered(state, None, fresh)
        whole = {}
        for name, shard in self._shards.items():
            found = state["state"].get(name)
            if name not in self.owners.of:
                found = None if found is None else self._gathered(found, shard, fresh)
            elif self._replica == 0:
                here, found = found, self.owners.to_main(name, found)
                if found is not None and found is not here:
                    fresh |= {id(value) for value in found.values() if isinstance(value, Tensor)}
            if found:
                whole[name] = found
        return {**self.owners.labels, "state": whole}

    def _gathered(self, state: Any, shard: Shard | None, fresh: set[int]) -> Any:
        """On rank 0 the whole state, of which every process has the part that `cut` gives; elsewhere nothing of use."""
        if isinstance(state, Mapping):
            return {key: self._gathered(value, self._shards.get(key, shard), fresh) for key, value in state.items()}
        if shard is None or not isinstance(state, Tensor) or state.shape != shard.local.shape:
            return state
        return self._to_main(state, len(shard.parameter), fresh) if shard.is_cut else state

    def _to_main(self, part: Tensor, num_rows: int, fresh: set[int]) -> Tensor:
        """The whole tensor on rank 0, on the host, whose id is added to `fresh`; elsewhere the part."""
        if self._replica > 0:  # copies of what rank 0's group has
            return part
        whole = gather_rows(part, num_rows, self._group, to=0)
        if whole is None:
            return part
        whole = whole.cpu()
        fresh.add(id(whole))
        return whole


class Cut:
    """An object that takes this process's part of a whole state."""

    copies = True  # what it takes

    def __init__(self, inner: Stateful, strategy: Sharded, is_optimizer: bool) -> None:
        self._inner, self._strategy, self._is_optimizer = inner, strategy, is_optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state by index, as versions before this one saved it."""
        if self._is_optimizer and "state_dict" in state_dict:
            raise ValueError("it was saved by an earlier version; continue with parallel=ddp until it is saved again")
        if self._is_optimizer:
            class_here = self._inner.state_dict()["class"]
            self._inner.load_state_dict(self._strategy.cut_optimizer(state_dict, class_here))
        else:
            self._inner.load_state_dict(self._strategy.cut(state_dict, {}))


def _empty_ones(module: nn.Module) -> set[nn.Parameter]:
    """Parameters without elements (a layer with rank 0, or no S): there is nothing to cut."""
    return {parameter for parameter in module.parameters() if parameter.numel() == 0}


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()
