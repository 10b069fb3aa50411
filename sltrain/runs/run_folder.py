"""One folder holds one run: its configuration, metrics, checkpoints and, at the end, its summary.

    outputs/2026-01-31_12-00-00_llama_60m_sltrain/
        config.yaml       the composed configuration, as last started
        tokenizer.json    the tokenizer, unmodified
        metrics.jsonl     one line an event
        checkpoints/      see checkpoint.py
        summary.json      the final line; it exists if and only if the run is finished

A folder that holds a run is only ever continued, and only with a configuration that means the same mathematics.
"""

import contextlib
import itertools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from sltrain.config import RETIRED_KEYS
from sltrain.engine.metrics import to_strict_json
from sltrain.events import Event
from sltrain.runs.lock import RunLock

OURS = {"model", "method", "rank", "sparsity"}  # keys of every config.yaml of this program
LEFT_BEHIND = (".lock", "config.yaml.tmp")  # by a start that was cut short


class RunFolder:
    """The folder of one run. Nothing is written before `claim`.

    `is_new` asks for a folder that no run has had before: its name then gets a suffix if another process was faster.
    """

    def __init__(self, path: Path, is_new: bool = False) -> None:
        self.path = path
        self.is_new = is_new
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
        """Whether there is training to lose; a run that failed before its first update may begin anew."""
        if self.is_finished or self.has_checkpoint:
            return True
        return self.metrics_file.exists() and b'"event": "train"' in self.metrics_file.read_bytes()

    def check(self, config: dict[str, Any], resume: str, changeable: Collection[str]) -> None:
        """Refuse (ValueError) a folder with other things in it, and one whose run another configuration must not
        continue."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file; name a folder")
        foreign = [entry.name for entry in self.path.iterdir() if entry.name not in LEFT_BEHIND]
        if foreign and not self._is_ours():
            raise ValueError(f"run_dir={self.path} holds other files and no run; name a new or an empty folder")
        if not self.has_progress:
            return
        if resume == "never":
            raise ValueError(f"run_dir={self.path} holds a run; resume=auto continues it, another run_dir starts anew")
        changed = self._changes(config, changeable)
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise ValueError(
                f"run_dir={self.path} holds another run: {'; '.join(changed[:3])}{more}."
                " Type the old values, or name another run_dir"
            )

    def _is_ours(self) -> bool:
        """Whether config.yaml is one of this program."""
        return self.config_file.exists() and self._saved_config().keys() >= OURS

    def _saved_config(self) -> dict[str, Any]:
        try:
            saved = yaml.safe_load(self.config_file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            saved = None
        if not isinstance(saved, dict):
            raise ValueError(f"{self.config_file} is damaged; restore it, or name another run_dir")
        return saved

    def _changes(self, config: dict[str, Any], changeable: Collection[str]) -> list[str]:
        saved = self._saved_config()
        for key, todays in RETIRED_KEYS.items():
            if (value := saved.pop(key, todays)) != todays:
                raise ValueError(
                    f"run_dir={self.path} holds a run with {key}={value}, which this version can read but not continue"
                    f" (only {key}={todays}); name another run_dir"
                )
        # A key that did not exist yet when the run began has the value that the run was made with: the default.
        skipped = {*changeable, *(key for key in config if key not in saved)}
        for group in config:
            if isinstance(config[group], dict) and isinstance(saved.get(group), dict) and "name" in saved[group]:
                skipped |= {f"{group}.{key}" for key in config[group] if key not in saved[group]}
        old, new = flatten(saved), flatten(config)
        skipped |= {key for key, value in old.items() if not value and key not in new}  # once an option of every source
        return [
            f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not {key, key.split(".")[0], ".".join(key.split(".")[:2])} & skipped
        ]

    def claim(self, config: dict[str, Any], resume: str, changeable: Collection[str], tokenizer_json: str) -> Path:
        """Make the folder if need be, lock it against a second process, write the configuration and the tokenizer;
        return its path.

        Raises RunLocked if a live process has it, ValueError if its tokenizer is another, or if what another process
        did to it since `check` forbids to go on.
        """
        self.path = _make_new(self.path) if self.is_new else self.path
        self._lock = RunLock(self.path)
        self.check(config, resume, changeable)
        if self.is_finished:
            raise ValueError(f"the run in {self.path} was finished by another process just now; nothing to do")
        if self.has_checkpoint:
            if not self.tokenizer_file.exists() or self.tokenizer_file.read_bytes() != tokenizer_json.encode():
                raise ValueError(
                    f"the tokenizer is not the one this run began with ({self.tokenizer_file});"
                    " name that file: tokenizer=PATH"
                )
        else:
            self.write_config(config)  # first: it marks the folder as ours
            write_atomically(self.tokenizer_file, tokenizer_json)
        return self.path

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.yaml: what the run was last started with."""
        write_atomically(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()

    def finish(self, final: Event) -> None:
        """Write summary.json: from now on the run is finished."""
        write_atomically(self.summary_file, to_strict_json(final) + "\n")


def _make_new(path: Path) -> Path:
    """Make the folder `path`, or the first free one of path_2, path_3, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in itertools.chain([path], (path.with_name(f"{path.name}_{i}") for i in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError("unreachable")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted key -> value. An empty mapping is no key."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8, or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
