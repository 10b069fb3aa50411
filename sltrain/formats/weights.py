"""Weights in safetensors files, read and written one tensor or shard at a time, so that they need little memory.

Up to 5 GB a folder has one file, STEM.safetensors; above, it has numbered shards and STEM.safetensors.index.json, which
maps tensors to shards. With the stem `model` this is Hugging Face's layout, and that of a checkpoint's model file.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MAX_SHARD_BYTES = 5_000_000_000
STEM = "model"  # of file names in exports of format dense, and in checkpoints


def write_weights(
    folder: Path,
    shapes: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = STEM,
) -> int:
    """Write the tensor `make(name)` for each name into `folder`, and return their bytes. At most one shard is held.

    `shapes` gives shape and dtype of each by a tensor, which may be on the meta device. Raises OSError for a disk that
    cannot be written.
    """
    split = split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        get_storage_id=lambda tensor: None,  # no tensor shares memory
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        with _readable_errors(folder / file):
            save_file({name: make(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file makes it readable only to its owner
    total = sum(tensor.nbytes for tensor in shapes.values())
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        _index(folder, stem).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


class WeightFiles:
    """The tensors of a folder by name, read on demand. Raises OSError if a file is missing or damaged, and ValueError
    for a damaged index."""

    def __init__(self, folder: Path, stem: str = STEM) -> None:
        self.folder = folder
        index = _index(folder, stem)
        files = [f"{stem}.safetensors"]
        if index.exists():
            try:
                files = sorted({str(Path(file)) for file in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is damaged: it should map tensors to files") from error
        self._files: dict[str, safe_open] = {}
        for file in files:
            with _readable_errors(folder / file):
                opened = safe_open(folder / file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU. Raises ValueError if there is none."""
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from an empty slice of it."""
        return self._file(name).get_slice(name)[:0].dtype

    def fill(
        self, module: nn.Module, prefix: str = "", device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Assign the tensor `prefix` + NAME to every parameter and buffer NAME of `module`, which may be on the meta
        device: on `device`, floating-point values in `dtype` (None: unchanged).

        Without a move or cast a tensor is not copied but memory-mapped, copy on write; the file never changes. Raises
        ValueError for a missing tensor or another shape.
        """
        state = module.state_dict()
        for name, tensor in state.items():
            self._check(f"{prefix}{name}", tensor)
        values = {name: self.read(f"{prefix}{name}") for name in state}
        module.load_state_dict({name: cast(value, dtype).to(device) for name, value in values.items()}, assign=True)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless these are exactly the tensors of `model`, by name and shape."""
        expected = model.state_dict()
        for name, tensor in expected.items():
            self._check(name, tensor)
        if more := set(self.names()) - expected.keys():
            raise ValueError(f"{self.folder} holds {min(more)}, which the model does not have")

    def _file(self, name: str) -> safe_open:
        if name not in self._files:
            raise ValueError(f"{self.folder} holds no tensor {name}")
        return self._files[name]

    def _check(self, name: str, tensor: Tensor) -> None:
        if self.shape(name) != tuple(tensor.shape):
            raise ValueError(f"{self.folder}: {name} is {self.shape(name)}, the model needs {tuple(tensor.shape)}")


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in `dtype` (None: unchanged); integers, such as positions, unchanged."""
    return tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor


def stored(tensor: Tensor, dtype: torch.dtype, trained: torch.dtype) -> Tensor:
    """The tensor of a model trained in the dtype `trained` as a compressed export in `dtype` holds it: as `cast`, but
    one that was trained in a dtype of its own keeps it, such as a frozen W0."""
    return cast(tensor, dtype) if tensor.dtype == trained else tensor


def _index(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors.index.json"


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn errors of safetensors into OSError with the file's name, in one line."""
    try:
        yield
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
