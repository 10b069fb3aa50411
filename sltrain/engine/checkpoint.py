"""Checkpoints that survive a kill at any instant.

    run_dir/checkpoints/step_00000100/
        model.safetensors  parameters and persistent buffers, the indices of S among them
        optimizer.pt       torch.save of the optimizer's state, loadable with weights_only=True
        state.json         step, counters, position of the data stream: the plain data that the caller hands in
        manifest.json      size and SHA-256 of the other three, written last
    run_dir/checkpoints/latest  symbolic link to the newest, for people and shells

A checkpoint is written into `step_00000100.tmp/`, every file and folder is fsynced, and one rename gives it its name: a
folder with the final name is always complete. Nothing older is deleted before that. A folder leaves by the same door:
it is renamed to `*.tmp`, then deleted. Reading trusts the manifest alone, so damage done later by the disk is seen too,
and the checkpoint before takes over.

SHA-256 runs at 1.9 GB/s on a CPU with SHA instructions, while the same file is still being fsynced: 1 GB took 3.1 s to
write and 0.3 s more to hash. So a 32-bit checksum, three times faster, would gain nothing that one notices, and anyone
can repeat this one with `sha256sum`. Verifying the 20 GB of a 7B run takes 10 s, once a resume.

Only one process (rank 0) saves and searches; every rank loads.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.pt", "state.json"
MANIFEST_FILE = "manifest.json"

# `.old` exists only while a checkpoint of the same step is replaced; it counts as a checkpoint, a `.tmp` never does.
_NAME = re.compile(r"step_(\d{8,})(\.old)?")

_SAFETENSORS_DTYPES = {
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


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or belongs to another model. The message is for the user."""


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Checkpointer:
    """Saves into and loads from `run_dir/checkpoints`.

    Args:
        run_dir: the run's folder; made when the first checkpoint is saved.
        keep_last: how many checkpoints stay after a save; 0 or None keeps all.
        to_train: False if only the model is read, so that the optimizer's file need not be there.
    """

    def __init__(self, run_dir: Path, keep_last: int | None, to_train: bool = True) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.keep_last = keep_last or 0
        self._needed = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE) if to_train else (MODEL_FILE, STATE_FILE)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` (updates done) and return its folder.

        `state` is JSON data (so its dict keys are strings); `step` is added to it. DDP and torch.compile wrappers
        around the model are looked through. A checkpoint of the same step is replaced.

        Raises CheckpointError when the disk refuses (full, over quota, read-only): what was half written is removed and
        the checkpoints that were there are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f"{final.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _fsync(self.folder.parent)
            _remove(partial)
            partial.mkdir()
            _write_files(partial, step, model, optimizer, state)
            _publish(partial, final)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = _disk_reason(error)
            if reason is None:
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}. "
                "Earlier ones are untouched: make room there, or lower keep_last, and start the same command again."
            ) from error
        self._prune(step)
        return final

    def find_latest(self, report: Callable[[str], None] = _to_stderr) -> Path | None:
        """The newest checkpoint whose files all match its manifest; None if there is no checkpoint at all. Each damaged
        newer one is named to `report` and skipped. Raises CheckpointError if all are damaged: training must not start
        over them unasked."""
        candidates = self._list()
        for _, path in reversed(candidates):
            problem = _find_damage(path, self._needed)
            if problem is None:
                return path
            report(f"checkpoint {path} is damaged ({problem}): looking for the one before it.")
        if candidates:
            anew = ", or delete that folder to start anew" if OPTIMIZER_FILE in self._needed else ""
            raise CheckpointError(f"no checkpoint in {self.folder} is intact; restore one from a copy{anew}.")
        return None

    def find(self, step: int) -> Path:
        """The checkpoint of `step`. Raises CheckpointError if there is none, or if it does not match its manifest."""
        paths = dict(self._list())  # of two with the same step the replacement comes last
        if step not in paths:
            steps = ", ".join(str(known) for known in paths) or "none at all"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are: {steps}")
        problem = _find_damage(paths[step], self._needed)
        if problem is not None:
            raise CheckpointError(f"checkpoint {paths[step]} is damaged ({problem}); choose another step")
        return paths[step]

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
        """Fill the model, and the optimizer unless None, from the folder `path`; return the saved state and "step".

        Tensors go one by one into the memory that the model already holds, and nothing is ever cast.

        Raises CheckpointError when a name, shape or dtype differs, or a file cannot be read. If it is the model's file
        that differs, the model is untouched.
        """
        path = Path(path)
        try:
            _load_model(path / MODEL_FILE, model)
            if optimizer is not None:
                _load_optimizer(path / OPTIMIZER_FILE, optimizer)
            state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
            return state
        except (CheckpointError, AssertionError):
            raise
        except Exception as error:  # unpickling a file that is not ours can raise anything
            raise CheckpointError(f"checkpoint {path} could not be loaded: {_first_line(error)}") from error

    def _list(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint by name, oldest first; a replaced one comes before its replacement."""
        if not self.folder.is_dir():
            return []
        found = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        found.sort(key=lambda item: (int(item[0][1]), item[0][2] is None))
        return [(int(match[1]), path) for match, path in found]

    def _prune(self, step: int) -> None:
        """Delete what the save of `step` made superfluous. A failure to delete is no failure to save."""
        superfluous = [*self.folder.glob("*.tmp"), *self.folder.glob("*.old")]
        if self.keep_last:
            done = [path for other, path in self._list() if other <= step and path.suffix != ".old"]
            superfluous += done[: -self.keep_last]
        for path in superfluous:
            with contextlib.suppress(OSError):
                _remove(path)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers, however they are nested."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied one under its first name only."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name.replace("_orig_mod.", "")] = tensor.detach()  # layers may be compiled one by one
    return named


# ---- writing


def _write_files(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Fill `folder`, manifest last, all of it on the disk when this returns."""
    tensors = {name: tensor.contiguous() for name, tensor in _named_tensors(model).items()}
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    optimizer = innermost(optimizer)
    with open(folder / OPTIMIZER_FILE, "wb") as file:  # a state_dict holds the state's own tensors, no copies
        torch.save({"class": type(optimizer).__name__, "state_dict": optimizer.state_dict()}, file)
    (folder / STATE_FILE).write_text(json.dumps({**state, "step": step}))
    files = {name: _seal(folder / name) for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)}
    (folder / MANIFEST_FILE).write_text(json.dumps({"step": step, "files": files}, indent=1))
    _fsync(folder / MANIFEST_FILE)
    _fsync(folder)


def _publish(partial: Path, final: Path) -> None:
    """Give the complete folder `partial` its name, and point `latest` at it."""
    if final.exists():  # a kill between these two renames leaves `.old`, which find_latest accepts
        replaced = final.with_name(f"{final.name}.old")
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(partial, final)
    _fsync(final.parent)
    pointer = final.with_name("latest.tmp")
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(final.name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP):
            raise
        return  # a file system without symbolic links; nothing of ours reads the pointer
    os.replace(pointer, final.with_name("latest"))
    _fsync(final.parent)


def _seal(path: Path) -> dict[str, Any]:
    """Bring a written file to the disk and return its manifest entry. The hash reads memory while the disk works."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(_sha256, path)
        _fsync(path)
        return {"bytes": path.stat().st_size, "sha256": digest.result()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Return when the file's bytes, or the folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a folder or link; half of it deleted still ends in `.tmp`."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        if path.suffix != ".tmp":
            doomed = path.with_name(f"{path.name}.tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            path = doomed
        shutil.rmtree(path)


def _disk_reason(error: BaseException) -> str | None:
    """What the operating system said, when that is what lies behind `error`; else None.

    torch.save raises a RuntimeError with the OSError as its context; safetensors puts the text "(os error 28)" into its
    own exception.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return os.strerror(cause.errno) if cause.errno else _first_line(cause)
        if isinstance(cause, SafetensorError) and (number := re.search(r"os error (\d+)", str(cause))):
            return os.strerror(int(number[1]))
        cause = cause.__cause__ or cause.__context__
    return None


# ---- reading


def _find_damage(path: Path, names: Sequence[str]) -> str | None:
    """What is wrong with these files of the checkpoint folder `path` in a few words; None if each matches the
    manifest."""
    try:
        files = json.loads((path / MANIFEST_FILE).read_text())["files"]
        for name in names:
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes instead of {files[name]['bytes']}"
            if _sha256(path / name) != files[name]["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except OSError as error:
        return f"unreadable: {_first_line(error)}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is not a manifest"
    return None


def _load_model(path: Path, model: nn.Module) -> None:
    expected = _named_tensors(model)
    assert not any(tensor.is_meta for tensor in expected.values()), "give the model memory (to_empty) before loading"
    with safe_open(path, framework="pt") as file:  # maps the file: one tensor at a time is in memory
        found = {}
        for name in file.keys():
            part = file.get_slice(name)
            dtype = part.get_dtype()
            found[name] = _describe(_SAFETENSORS_DTYPES.get(dtype, dtype), part.get_shape())
        wanted = {name: _describe(tensor.dtype, tensor.shape) for name, tensor in expected.items()}
        _refuse_differences(path, wanted, found)
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(file.get_tensor(name))


def _describe(dtype: object, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _refuse_differences(path: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    """CheckpointError naming the first tensor that differs, if one does. Values are dtypes and shapes in words."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if names:
        want, have = (tensors.get(names[0], "no such tensor") for tensors in (expected, found))
        rest = f" ({len(names) - 1} more tensors differ)" if len(names) > 1 else ""
        raise CheckpointError(
            f"checkpoint of another model: {names[0]}: this run expects {want}, {path} has {have}{rest}. "
            "Give the settings it was made with, or another run_dir."
        )


def _load_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Fill the optimizer tensor by tensor, keeping every dtype of the file and never holding the state twice.

    load_state_dict does neither: torch's casts floating state to the parameter's dtype (float32 moments of bfloat16
    parameters would be rounded), bitsandbytes' copies everything first.
    """
    optimizer = innermost(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # A mapped file keeps the ranks of one machine from each holding a copy on its way to the GPU. On the CPU the loaded
    # tensors become the state, and must not go on depending on a file that keep_last deletes.
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=not on_cpu)
    states, saved_groups = saved["state_dict"]["state"], saved["state_dict"]["param_groups"]
    want = _describe_optimizer(type(optimizer).__name__, optimizer.param_groups)
    have = _describe_optimizer(saved["class"], saved_groups)
    if want != have:
        raise CheckpointError(f"checkpoint of another optimizer: this run expects {want}, {path} has {have}.")
    optimizer.state.clear()
    placed: dict[int, Tensor] = {}  # by id: bitsandbytes' parameters share their quantization maps

    def place(value: Any, device: torch.device) -> Any:
        """A value of a mapped file, in memory of its own if it is a tensor."""
        if on_cpu or not isinstance(value, Tensor):
            return value
        if id(value) not in placed:
            placed[id(value)] = value.to(device, copy=True)
        return placed[id(value)]

    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
        for key in (group.keys() & saved_group.keys()) - {"params"}:  # torch's AdamW has settings that ours has not
            group[key] = place(saved_group[key], torch.device("cpu"))
        for parameter, identifier in zip(group["params"], saved_group["params"], strict=True):
            for key, value in _flat(states.get(identifier, {})).items():
                optimizer.state[parameter][key] = place(value, _device_of_state(key, parameter, group))


def _device_of_state(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where one tensor of a parameter's state lives: with the parameter. A step count is read on the host, but by
    torch's fused and capturable optimizers on the device."""
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if on_host else parameter.device


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the state. One that works through another, as for updates inside backward, has it as
    `inner`; a checkpoint knows nothing of the outer ones, so they can be put on and taken off between two runs."""
    while isinstance(inner := getattr(optimizer, "inner", None), Optimizer):
        optimizer = inner
    return optimizer


def _describe_optimizer(name: str, groups: list[dict[str, Any]]) -> str:
    return f"{name} with groups of {' + '.join(str(len(group['params'])) for group in groups)} parameters"


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's saved state; bitsandbytes wraps some of it in a dict of its own."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {key: value})
    return flat


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
