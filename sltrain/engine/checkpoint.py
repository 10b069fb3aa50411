"""The checkpoints of a run.

    run_dir/checkpoints/step_00000100/
        model.safetensors  parameters and persistent buffers, the indices of S among them
        optimizer.pt       the optimizer's state by parameter name (optim/named_state.py); and NAME.pt for every other
                           object with a state of its own
        state.json         step, counters, position of the data stream: plain data from the caller
        manifest.json      size and SHA-256 of the others, written last
        .metadata, __RANK_0.distcp   instead of model and optimizer, with parallel.checkpoint=sharded (sharded_files.py)
    run_dir/checkpoints/latest  symbolic link to the newest, for people and shells

A folder of such a name is always complete (sealed_folder.py), and older ones are deleted only after it is. If the disk
damages it later, the one before is used. Only rank 0 searches, and saves what is whole; every rank loads. Whether
training waits for a save or goes on meanwhile: saving.py.
"""

import contextlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint_files import (
    METADATA_FILE,
    CheckpointError,
    Contents,
    Part,
    all_rows,
    load_model,
    load_object,
    refuse_other_objects,
    save_object,
    save_tensors,
)
from sltrain.engine.distributed import Ranks, is_lost_rank
from sltrain.engine.sealed_folder import (
    disk_reason,
    find_damage,
    point_to,
    remove,
    sealed_files,
    write_sealed,
)
from sltrain.log import first_line

logger = logging.getLogger(__name__)

MODEL_FILE, STATE_FILE = "model.safetensors", "state.json"

# `.old` exists only while a checkpoint of the same step is replaced; it counts as a checkpoint, a `.tmp` never does.
_NAME = re.compile(r"step_(\d{8,})(\.old)?")


class Checkpointer:
    """Saves into and loads from `run_dir/checkpoints`.

    Args:
        run_dir: the run's folder, created by the first save.
        keep_last: how many checkpoints remain after a save; 0 or None keeps all.
        to_train: False to read only the model: the other objects' files may then be missing, but for those of `needed`.
        together: the processes that write each a share, over a group of their own; None: rank 0 writes everything.
    """

    def __init__(
        self,
        run_dir: Path,
        keep_last: int | None,
        to_train: bool = True,
        needed: Collection[str] = (),
        together: Ranks | None = None,
    ) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.keep_last = keep_last or 0
        self.to_train, self.needed, self.together = to_train, needed, together
        self._damaged: set[Path] = set()  # found while searching; they do not count among those that are kept

    def write(self, contents: Contents) -> Path:
        """Write the checkpoint of a step and return its folder; one of the same step is replaced. From any thread, one
        at a time. If processes write together, each gives its share, and all raise what fails on one.

        Raises CheckpointError when the disk refuses (full, over quota, read-only); earlier checkpoints are untouched
        and no partial one remains.
        """
        step = contents.step
        final = self.folder / f"step_{step:08d}"

        def fill(folder: Path) -> None:
            save_tensors(folder / MODEL_FILE, contents.tensors)
            for name, state in contents.objects.items():
                save_object(folder / object_file(name), state)
            add_state(folder)

        def add_state(folder: Path) -> None:
            (folder / STATE_FILE).write_text(contents.state)

        def point() -> None:
            point_to(final, self.folder / "latest")

        try:
            if self.together is None:
                write_sealed(final, fill, {"step": step})
                point()
            else:
                from sltrain.engine.sharded_files import write_shares  # DCP takes seconds to import

                write_shares(final, contents, self.together, add_state, {"step": step})
                self.together.on_main(point)
        except Exception as error:
            if is_lost_rank(error):
                raise CheckpointError(
                    f"the checkpoint of step {step} was not finished, as another process of the run is gone; earlier"
                    " ones are untouched"
                ) from error
            reason = disk_reason(error)
            if reason is None:
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}. "
                "Earlier ones are untouched: free space there, or lower keep_last, and start the same command again."
            ) from error
        self._damaged.discard(final)
        if self.together is None or self.together.is_main:
            self._prune(step)
        return final

    def find_latest(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest; None if there are no checkpoints. A warning names
        each damaged newer one. Raises CheckpointError if all are damaged: nobody asked to start over."""
        candidates = self._list()
        for _, path in reversed(candidates):
            problem = self._find_damage(path)
            if problem is None:
                return path
            logger.warning(f"checkpoint {path} is damaged ({problem}): trying the one before it.")
            self._damaged.add(path)
        if candidates:
            start_over = ", or delete that folder to start over" if self.to_train else ""
            raise CheckpointError(f"no checkpoint in {self.folder} is intact; restore one from a copy{start_over}.")
        return None

    def find_latest_step(self) -> tuple[Path | None, int]:
        """`find_latest`, and the step of that checkpoint; None and 0 if there is none."""
        path = self.find_latest()
        return path, 0 if path is None else self.read_state(path)["step"]

    def newest_state(self) -> dict[str, Any]:
        """The plain data of the newest checkpoint in which it can be read, whatever else is damaged there; empty if
        there is none."""
        for _, path in reversed(self._list()):
            with contextlib.suppress(OSError, ValueError):
                return self.read_state(path)
        return {}

    def find(self, step: int) -> Path:
        """The checkpoint of `step`. Raises CheckpointError if there is none, or if it does not match its manifest."""
        paths = dict(self._list())  # of two with the same step the replacement comes last
        if step not in paths:
            steps = ", ".join(map(str, paths)) or "none at all"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are: {steps}")
        problem = self._find_damage(paths[step])
        if problem is not None:
            raise CheckpointError(f"checkpoint {paths[step]} is damaged ({problem}); choose another step")
        return paths[step]

    def load(
        self,
        path: Path,
        model: nn.Module,
        objects: Mapping[str, Stateful] | None,
        part: Part = all_rows,
    ) -> dict[str, Any]:
        """Load the folder `path` into the model and, unless None, into these objects; return the saved state with
        "step". `part(tensor)` is what to fill of the model's tensor, and with which rows of the saved one; None: all.

        Raises CheckpointError when a tensor's name, shape or dtype differs (the model is then untouched), when it
        holds the state of other objects, or when a file cannot be read.
        """
        path = Path(path)
        try:
            if is_in_shares(path):
                from sltrain.engine.sharded_files import load_shares  # DCP takes seconds to import

                load_shares(path, model, objects, part)
            else:
                _load_whole(path, model, objects, part)
            return self.read_state(path)
        except (CheckpointError, AssertionError):
            raise
        except Exception as error:  # unpickling a foreign file can raise anything
            raise CheckpointError(f"checkpoint {path} could not be loaded: {first_line(error)}") from error

    @staticmethod
    def read_state(path: Path) -> dict[str, Any]:
        """The plain data of the checkpoint in the folder `path`, with "step"."""
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        return state

    def _find_damage(self, path: Path) -> str | None:
        if is_in_shares(path):  # each has a part of the model
            return find_damage(path, (METADATA_FILE, STATE_FILE))
        return find_damage(path, (MODEL_FILE, STATE_FILE, *self.needed), has_more=self.to_train)

    def _list(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint by name, oldest first; a replaced one comes before its replacement."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [(match, path) for path in entries if (match := _NAME.fullmatch(path.name))]
        found.sort(key=lambda item: (int(item[0][1]), item[0][2] is None))
        return [(int(match[1]), path) for match, path in found]

    def clean(self, continued: Path) -> None:
        """Delete what killed starts left beside the checkpoint that a run goes on from: if that is the last one, no
        later save does it."""
        for path in (*self.folder.glob("*.tmp"), *self.folder.glob("*.old")):
            if path != continued:
                with contextlib.suppress(OSError):
                    remove(path)

    def _prune(self, step: int) -> None:
        """Delete what the save of `step` made superfluous. A failure to delete is no failure to save."""
        superfluous = [*self.folder.glob("*.tmp"), *self.folder.glob("*.old")]
        if self.keep_last:
            done = [path for other, path in self._list() if other <= step and path.suffix != ".old"]
            intact = [path for path in done if path not in self._damaged]
            superfluous += [*intact[: -self.keep_last], *(path for path in done if path in self._damaged)]
        for path in superfluous:
            with contextlib.suppress(OSError):
                remove(path)


def object_file(name: str) -> str:
    """The file of an object: action.pool.pt for action/pool."""
    return f"{name.replace('/', '.')}.pt"


def is_in_shares(path: Path) -> bool:
    """Whether the checkpoint in the folder `path` was written by all processes together."""
    try:
        return METADATA_FILE in sealed_files(path)
    except (OSError, ValueError):
        return False


def _load_whole(path: Path, model: nn.Module, objects: Mapping[str, Stateful] | None, part: Part) -> None:
    """Fill the model and, unless None, these objects from files that rank 0 wrote."""
    if objects is not None:
        found = {name for name in sealed_files(path) if name.endswith(".pt")}
        refuse_other_objects(path, found, map(object_file, objects))
    load_model(path / MODEL_FILE, model, part)
    is_on_cpu = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    for name, stateful in (objects or {}).items():
        load_object(path / object_file(name), stateful, is_on_cpu)
