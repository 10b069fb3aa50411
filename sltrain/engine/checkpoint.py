"""The checkpoints of a run.

    run_dir/checkpoints/step_00000100/
        model.safetensors  parameters and persistent buffers, the indices of S among them
        optimizer.pt       the optimizer's state by parameter name (optim/named_state.py); and NAME.pt for every other
                           object that has a state of its own
        state.json         step, counters, position of the data stream: the plain data that the caller hands in
        manifest.json      size and SHA-256 of the others, written last
    run_dir/checkpoints/latest  symbolic link to the newest, for people and shells

A folder with such a name is always complete (sealed_folder.py), and nothing older is deleted before it is there. If the
disk damages one later, the one before takes over.

Only one process (rank 0) saves and searches; every rank loads.
"""

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint_files import (
    ADVICE,
    CheckpointError,
    load_model,
    load_object,
    save_model,
    save_object,
)
from sltrain.engine.sealed_folder import (
    disk_reason,
    find_damage,
    first_line,
    point_to,
    remove,
    sealed_files,
    write_sealed,
)

logger = logging.getLogger(__name__)

MODEL_FILE, STATE_FILE = "model.safetensors", "state.json"
OBJECT_SUFFIX = ".pt"

# `.old` exists only while a checkpoint of the same step is replaced; it counts as a checkpoint, a `.tmp` never does.
_NAME = re.compile(r"step_(\d{8,})(\.old)?")


class Checkpointer:
    """Saves into and loads from `run_dir/checkpoints`.

    Args:
        run_dir: the run's folder; made when the first checkpoint is saved.
        keep_last: how many checkpoints stay after a save; 0 or None keeps all.
        to_train: False if only the model is read, so that the other objects' files need not be there.
    """

    def __init__(self, run_dir: Path, keep_last: int | None, to_train: bool = True) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.keep_last = keep_last or 0
        self.to_train = to_train

    def save(self, step: int, model: nn.Module, objects: Mapping[str, Stateful], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` (updates done) and return its folder.

        `objects` are what has a state besides the model, by name: the optimizer, what actions keep. `state` is JSON
        data (so its dict keys are strings); `step` is added to it. DDP and torch.compile wrappers around the model are
        looked through. A checkpoint of the same step is replaced.

        Raises CheckpointError when the disk refuses (full, over quota, read-only): what was half written is removed and
        the checkpoints that were there are untouched.
        """
        final = self.folder / f"step_{step:08d}"

        def fill(folder: Path) -> None:
            save_model(folder / MODEL_FILE, model)
            for name, stateful in objects.items():
                save_object(folder / object_file(name), stateful)
            (folder / STATE_FILE).write_text(json.dumps({**state, "step": step}))

        try:
            write_sealed(final, fill, {"step": step})
            point_to(final, self.folder / "latest")
        except Exception as error:
            reason = disk_reason(error)
            if reason is None:
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}. "
                "Earlier ones are untouched: make room there, or lower keep_last, and start the same command again."
            ) from error
        self._prune(step)
        return final

    def find_latest(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest; None if there is no checkpoint at all. Each damaged
        newer one is named in a warning and skipped. Raises CheckpointError if all are damaged: training must not start
        over them unasked."""
        candidates = self._list()
        for _, path in reversed(candidates):
            problem = self._find_damage(path)
            if problem is None:
                return path
            logger.warning(f"checkpoint {path} is damaged ({problem}): looking for the one before it.")
        if candidates:
            anew = ", or delete that folder to start anew" if self.to_train else ""
            raise CheckpointError(f"no checkpoint in {self.folder} is intact; restore one from a copy{anew}.")
        return None

    def find(self, step: int) -> Path:
        """The checkpoint of `step`. Raises CheckpointError if there is none, or if it does not match its manifest."""
        paths = dict(self._list())  # of two with the same step the replacement comes last
        if step not in paths:
            steps = ", ".join(str(known) for known in paths) or "none at all"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are: {steps}")
        problem = self._find_damage(paths[step])
        if problem is not None:
            raise CheckpointError(f"checkpoint {paths[step]} is damaged ({problem}); choose another step")
        return paths[step]

    def load(self, path: Path, model: nn.Module, objects: Mapping[str, Stateful] | None) -> dict[str, Any]:
        """Fill the model, and these objects unless None, from the folder `path`; return the saved state and "step".

        Raises CheckpointError when a tensor's name, shape or dtype differs, when it holds the state of other objects,
        or when a file cannot be read. If it is the model's file that differs, the model is untouched.
        """
        path = Path(path)
        try:
            if objects is not None:
                _refuse_other_objects(path, objects)
            load_model(path / MODEL_FILE, model)
            is_on_cpu = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
            for name, stateful in (objects or {}).items():
                load_object(path / object_file(name), stateful, is_on_cpu)
            return self.read_state(path)
        except (CheckpointError, AssertionError):
            raise
        except Exception as error:  # unpickling a file that is not ours can raise anything
            raise CheckpointError(f"checkpoint {path} could not be loaded: {first_line(error)}") from error

    @staticmethod
    def read_state(path: Path) -> dict[str, Any]:
        """The plain data of the checkpoint in the folder `path`, and "step"."""
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        return state

    def _find_damage(self, path: Path) -> str | None:
        return find_damage(path, (MODEL_FILE, STATE_FILE), has_more=self.to_train)

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
                remove(path)


def object_file(name: str) -> str:
    """The file of an object: action.pool.pt for one called action/pool."""
    return f"{name.replace('/', '.')}{OBJECT_SUFFIX}"


def _refuse_other_objects(path: Path, objects: Mapping[str, Stateful]) -> None:
    """CheckpointError naming the first object whose state only the run or only the checkpoint has, if there is one."""
    wanted = {object_file(name) for name in objects}
    found = {name for name in sealed_files(path) if name.endswith(OBJECT_SUFFIX)}
    for name in sorted(found ^ wanted):
        what = "has no" if name in wanted else "also has"
        which = "which this run needs" if name in wanted else "which this run does not know"
        raise CheckpointError(f"checkpoint {path} {what} {name}, {which}. {ADVICE}")
