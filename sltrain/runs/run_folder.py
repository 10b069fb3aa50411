"""One folder holds one run: its configuration, metrics, checkpoints and, at the end, its summary.

    outputs/2026-01-31_12-00-00_llama_60m_sltrain/
        config.yaml       the composed configuration of the latest start
        tokenizer.json    the tokenizer, unmodified
        tokenizer_config.json   which of its tokens end and pad texts; a run of an earlier version lacks it
        metrics.jsonl     one line an event
        checkpoints/      see checkpoint.py
        summary.json      the final line; it exists if and only if the run is finished

A folder that holds a run can only be continued, and only with a configuration that means the same mathematics.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from sltrain.config import RETIRED_KEYS
from sltrain.engine.metrics import to_strict_json
from sltrain.engine.sealed_folder import write_atomically
from sltrain.events import Event
from sltrain.runs.lock import RunLock

OURS = {"model", "method", "rank", "sparsity"}  # keys of every config.yaml of this program
LEFTOVERS = (".lock", "config.yaml.tmp")  # of a start that was killed


class AnotherRun(ValueError):
    """The folder holds a run that was begun with other keys."""


class RunFolder:
    """The folder of one run; `claim` is the first to write to it.

    `is_new` asks for a folder without a run: its name gets a suffix if another process was faster. `read_effective`
    reads a config.yaml of any version with today's keys and the values that the run was made with.
    """

    def __init__(
        self, path: Path, is_new: bool = False, read_effective: Callable[[Path], dict[str, Any]] | None = None
    ) -> None:
        self.path = path
        self.is_new = is_new
        self.read_effective = read_effective
        self.reopens = False  # set by whoever has checked that a finished run may go on: `claim` then continues it
        self._lock: RunLock | None = None

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def is_finished(self) -> bool:
        return self.summary_file.exists()

    @property
    def has_checkpoint(self) -> bool:
        return any(path.suffix != ".tmp" for path in self.path.glob("checkpoints/step_*"))

    @property
    def has_progress(self) -> bool:
        """Whether there is training to lose; a run that failed before its first update may start over."""
        if self.is_finished or self.has_checkpoint:
            return True
        return self.metrics_file.exists() and b'"event": "train"' in self.metrics_file.read_bytes()

    def check(self, config: dict[str, Any], resume: str, changeable: Collection[str]) -> None:
        """Raise ValueError for a folder with other content, and for a run that `config` and `resume` cannot continue
        (AnotherRun, because of its keys); `changeable` are the keys that may differ."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file; choose a folder")
        if any(entry.name not in LEFTOVERS for entry in self.path.iterdir()) and not (
            self.config_file.exists() and self._saved_config().keys() >= OURS
        ):
            raise ValueError(f"run_dir={self.path} holds other files and no run; choose a new or an empty folder")
        if not self.has_progress:
            return
        if resume == "never":
            raise ValueError(
                f"run_dir={self.path} holds a run; resume=auto continues it, another run_dir starts a new one"
            )
        if changed := self._changes(config, changeable):
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise AnotherRun(
                f"run_dir={self.path} holds another run: {'; '.join(changed[:3])}{more}."
                " Use the old values, or choose another run_dir"
            )

    def _saved_config(self) -> dict[str, Any]:
        try:
            return read_config(self.config_file)
        except ValueError as error:
            raise ValueError(f"{error}; restore it, or choose another run_dir") from None

    def _changes(self, config: dict[str, Any], changeable: Collection[str]) -> list[str]:
        """The differences between the saved configuration and `config` that mean another run, in words."""
        saved = self._saved_config()
        for key, todays in RETIRED_KEYS.items():
            if (value := saved.pop(key, todays)) != todays:
                raise ValueError(
                    f"run_dir={self.path} holds a run with {key}={value}, which this version can read but not continue"
                    f" (only {key}={todays}); choose another run_dir"
                )
        skipped = set(changeable)
        if self.read_effective is None:
            effective = saved
            skipped |= {key for key in config if key not in saved}
        else:  # a key that is newer than the run has the value that the run used: the default
            effective = self.read_effective(self.config_file)
        old, new = flatten(effective), flatten(config)
        return [
            f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not {key, key.split(".")[0], ".".join(key.split(".")[:2])} & skipped
        ]

    def claim(self, config: dict[str, Any], resume: str, changeable: Collection[str], tokenizer_json: str) -> Path:
        """Create the folder if necessary, lock it, write the configuration and the tokenizer; return its path.

        Raises RunLocked if a live process has it, and ValueError if its tokenizer differs or if another process has
        changed it since `check` so that the run cannot start.
        """
        self.path = _make_new(self.path) if self.is_new else self.path
        self._lock = RunLock(self.path)
        self.check(config, resume, changeable)
        if self.reopens:
            self.summary_file.unlink(missing_ok=True)
        if self.is_finished:
            raise ValueError(f"the run in {self.path} was finished by another process just now; nothing to do")
        if self.has_checkpoint:
            if not self.tokenizer_file.exists() or self.tokenizer_file.read_bytes() != tokenizer_json.encode():
                raise ValueError(
                    f"the tokenizer is not the one this run began with ({self.tokenizer_file});"
                    " choose that file: tokenizer=PATH"
                )
        else:
            self.write_config(config)  # first: it marks the folder as ours
            write_atomically(self.tokenizer_file, tokenizer_json)
        return self.path

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.yaml: the configuration of the latest start."""
        write_atomically(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def finish(self, final: Event) -> None:
        """Write summary.json, which makes the run a finished one."""
        write_atomically(self.summary_file, to_strict_json(final) + "\n")


def _make_new(path: Path) -> Path:
    """Create the folder `path`, or the first unused one of path_2, path_3, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in itertools.chain([path], (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError("unreachable")


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a config.yaml. Raises OSError, or ValueError if it is damaged."""
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged")
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted key -> value. An empty mapping has no keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat
