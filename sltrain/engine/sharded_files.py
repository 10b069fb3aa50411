"""A checkpoint to which every process writes its share (parallel.checkpoint=sharded), by torch.distributed.checkpoint.

    __RANK_0.distcp   what process RANK holds: its rows of weights and averages, its part of the optimizer's state
    .metadata         which rows of which tensor lie where
    state.json, manifest.json   as in every checkpoint

DCP plans, writes and finds rows again; what is saved only once (indices, numbers, copies of hsdp) it deals out over the
processes. Folder, hashes and the rename are ours (sealed_folder.py): each process hashes its own file, rank 0 publishes
all of them at once. All processes write together, over a group of their own, so that a thread may do it. Any number
of processes reads the folder, each the rows it needs, without talking to others.

Entries are called by their keys, joined by dots; `planner_data` of the metadata has them apart, so that DCP's own tools
(torch.distributed.checkpoint.format_utils) make one nested dict of the folder. DCP reads metadata by pickle and values
by torch.load, both of which run code that a file brings; the readers here refuse it.
"""

import io
import math
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint_files import (
    METADATA_FILE,
    CheckpointError,
    Contents,
    Part,
    Place,
    Stored,
    fill_model,
    give_state,
    refuse_other_objects,
)
from sltrain.engine.distributed import Ranks, ToldByAnotherRank
from sltrain.engine.sealed_folder import begin_sealed, disk_reason, partial_of, publish_sealed, seal

MODEL = "model"  # first key of its tensors; other objects have their own names


def write_shares(final: Path, contents: Contents, ranks: Ranks, add: Callable[[Path], None], facts: Any) -> None:
    """Write the folder `final`, of which `contents` is this process's part. `add(folder)` writes on rank 0 what belongs
    to no share. All of `ranks` call it, from any thread, and all raise what fails on one of them."""
    folder = partial_of(final)

    def begin() -> None:
        with _reasons():
            begin_sealed(final)

    def seal_own() -> dict[str, Any]:
        with _reasons():
            return seal(folder.glob(f"__{ranks.rank}_*"))

    def publish() -> None:
        with _reasons():
            add(folder)
            publish_sealed(final, sealed, facts)

    try:
        ranks.on_main(begin)
        _save(folder, contents, ranks)
        everyones = ranks.gather(ranks.everywhere(seal_own))
        sealed = {name: entry for each in everyones for name, entry in each.items()}
        ranks.on_main(publish)
    except Exception as error:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ToldByAnotherRank):  # the ranks that wait for this save agree on who says it
            raise OSError(str(error)) from None
        raise


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns an error of the disk into its reason alone, which other ranks can be told."""
    try:
        yield
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise OSError(reason) from error


def _save(folder: Path, contents: Contents, ranks: Ranks) -> None:
    """Write the shares and the metadata. A failure on one rank is raised as it was, on all."""
    entries = dict(_leaves({MODEL: contents.tensors, **contents.objects}))
    try:
        dcp.save({}, storage_writer=_Writer(folder), planner=_Planner(entries, contents), process_group=ranks.group)
    except dcp.api.CheckpointException as failed:
        error, _ = failed.failures[min(failed.failures)]
        raise error from None


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """The tensors and plain values in nested dicts, and their keys from the outside to the inside."""
    if not isinstance(value, Mapping) or (not value and place):
        yield place, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*place, key))


class _Writer(FileSystemWriter):
    """DCP's, whose metadata names no path of this machine."""

    def __init__(self, folder: Path) -> None:
        # `seal` syncs. Everything is in host memory: a loader that copies ahead would take GPU 0 from any thread.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with _reasons():
            return super().write_data(plan, planner)

    def storage_meta(self) -> None:
        return None


class _Planner(DefaultSavePlanner):
    """Plans to write the values at these places, and of a tensor in `contents.cuts` the rows that this process has."""

    def __init__(self, entries: Mapping[Place, Any], contents: Contents) -> None:
        super().__init__()
        self._cuts = contents.cuts or {}
        self._entries = {".".join(map(str, place)): (place, value) for place, value in entries.items()}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = [item for name in self._entries if (item := self._item(name)) is not None]
        self.plan = SavePlan(items, planner_data={name: place for name, (place, _) in self._entries.items()})
        return self.plan

    def _item(self, name: str) -> WriteItem | None:
        """What to write under this name; None: this process has no rows of it."""
        place, value = self._entries[name]
        if not isinstance(value, Tensor):
            return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
        first, num_rows = self._cuts.get(place, (0, len(value) if value.ndim else 1))
        if place in self._cuts and not len(value):
            return None
        offsets = torch.Size([first, *[0] * (value.ndim - 1)][: value.ndim])
        whole = torch.Size([num_rows, *value.shape[1:]][: value.ndim])
        kind = WriteItemType.SHARD if place in self._cuts else WriteItemType.TENSOR
        data = TensorWriteData(ChunkStorageMetadata(offsets, value.shape), TensorProperties(value.dtype), whole)
        return WriteItem(MetadataIndex(name, offsets), kind, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        _, value = self._entries[write_item.index.fqn]
        if isinstance(value, Tensor):
            return value.detach()
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream


class ShardedFiles:
    """A folder that `write_shares` wrote, read by one process. Raises OSError, or ValueError for other content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with open(folder / METADATA_FILE, "rb") as file:
            metadata = _Unpickler(file).load()
        self._found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = metadata.state_dict_metadata
        self._names = {place: name for name, place in metadata.planner_data.items()}
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    @property
    def objects(self) -> set[str]:
        """The names of those that have a state here, besides the model."""
        return {place[0] for place in self._names} - {MODEL}

    def tensors(self, name: str = MODEL) -> dict[str, Stored]:
        """The tensors of the model, or of an object whose state is tensors by name."""
        found = {place[1]: self._stored(place) for place in self._names if place[0] == name and len(place) == 2}
        return {key: value for key, value in found.items() if isinstance(value, Stored)}

    def state(self, name: str) -> dict[str, Any]:
        """The state of an object, its tensors not yet read."""
        state: dict[Any, Any] = {}
        for place in self._names:
            if place[0] != name:
                continue
            inner, (*outer, last) = state, place
            for key in outer:
                inner = inner.setdefault(key, {})
            stored = self._stored(place)
            if stored != {}:  # empty on one process, it may have entries of others
                inner[last] = stored
            else:
                inner.setdefault(last, {})
        found: dict[str, Any] = state[name]
        return found

    def _stored(self, place: Place) -> Any:
        """A tensor, not yet read; or another value."""
        name = self._names[place]
        found = self._found[name]
        if isinstance(found, BytesStorageMetadata):
            index = MetadataIndex(name)
            zero = torch.Size((0,))
            into = _Into(None)
            self._read([ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)], into)
            return into.value
        dtype = str(found.properties.dtype).removeprefix("torch.")
        return Stored(tuple(found.size), dtype, lambda rows: self._rows(name, found, rows))

    def _rows(self, name: str, found: TensorStorageMetadata, rows: slice | None) -> Tensor:
        """These rows of a tensor, or all of it."""
        offsets, sizes = [0] * len(found.size), list(found.size)
        if rows is not None:
            offsets[0], sizes[0] = rows.start, rows.stop - rows.start
        target = torch.empty(sizes, dtype=found.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, found, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self.folder} lacks rows of {name}")
        self._read(items, _Into(target))
        return target

    def _read(self, items: list[ReadItem], into: "_Into") -> None:
        self._reader.read_data(LoadPlan(items), into).wait()


def load_shares(path: Path, model: nn.Module, objects: Mapping[str, Stateful] | None, part: Part) -> None:
    """Fill the model and, unless None, these objects: see `Checkpointer.load`."""
    files = ShardedFiles(path)
    if objects is not None:
        refuse_other_objects(path, files.objects, objects.keys())
    fill_model(path, model, files.tensors(), part)
    for name, stateful in (objects or {}).items():
        state = files.state(name)
        give_state(path, name, stateful, state if getattr(stateful, "copies", False) else read_all(state))


def read_all(state: Any) -> Any:
    """A state with its tensors."""
    if isinstance(state, dict):
        return {key: read_all(value) for key, value in state.items()}
    return state.read(None) if isinstance(state, Stored) else state


class _Into(DefaultLoadPlanner):
    """Takes what is read: of a tensor into the one that is given, any other value into `value`."""

    def __init__(self, target: Tensor | None) -> None:
        super().__init__()
        self.target, self.value = target, None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, map_location="cpu", weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert self.target is not None
        starts_and_lengths = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.target[tuple(slice(start, start + length) for start, length in starts_and_lengths)]


class _Unpickler(pickle.Unpickler):
    """Makes the classes that describe tensors, and nothing else."""

    ALLOWED = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex TensorProperties"
                " TensorStorageMetadata _MEM_FORMAT_ENCODING"
            ).split()
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.ALLOWED:
            raise ValueError(f"{METADATA_FILE} asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)
