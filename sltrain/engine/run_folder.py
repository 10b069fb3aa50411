"""One folder holds one run: its configuration, metrics, checkpoints and, at the end, its summary.

    outputs/2026-01-31_12-00-00_llama_60m_sltrain/
        config.yaml       the composed configuration, as last started
        tokenizer.json    the tokenizer, unmodified
        metrics.jsonl     one line an event
        checkpoints/      see checkpoint.py
        summary.json      the final line; it exists if and only if the run is finished

A folder that holds a run is only ever continued, and only with a configuration that means the same mathematics.
"""

import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from sltrain.engine.checkpoint import RunLock


class RunFolder:
    """The folder of one run. Nothing is written before `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.tokenizer_file = path / "tokenizer.json"
        self._lock: RunLock | None = None

    @property
    def holds_run(self) -> bool:
        return self.config_file.exists()

    @property
    def is_finished(self) -> bool:
        return self.summary_file.exists()

    def check(self, config: dict[str, Any], resume: str, changeable: Collection[str]) -> None:
        """Refuse (ValueError) a folder with other things in it, and one whose run another configuration must not
        continue."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"run_dir={self.path} is a file; name a folder")
        if not self.holds_run:
            if any(entry.name != ".lock" for entry in self.path.iterdir()):
                raise ValueError(f"run_dir={self.path} holds other files and no run; name a new or an empty folder")
            return
        if resume == "never":
            raise ValueError(f"run_dir={self.path} holds a run; resume=auto continues it, another run_dir starts anew")
        old = flatten(yaml.safe_load(self.config_file.read_text()))
        new = flatten(config)
        changed = [
            f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[0] not in changeable
        ]
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise ValueError(
                f"run_dir={self.path} holds another run: {'; '.join(changed[:3])}{more}."
                " Type the old values, or name another run_dir"
            )

    def claim(self, config: dict[str, Any], tokenizer_json: str) -> None:
        """Make the folder if need be, lock it against a second process, and write the configuration and the tokenizer.

        Raises RunLocked if a live process has it, ValueError if the run was trained with another tokenizer.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.path)
        if self.tokenizer_file.exists() and self.tokenizer_file.read_text() != tokenizer_json:
            raise ValueError(
                f"the tokenizer is not the one this run began with ({self.tokenizer_file});"
                " name that file: tokenizer=PATH"
            )
        write_atomically(self.tokenizer_file, tokenizer_json)
        write_atomically(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()

    def finish(self, final: dict[str, Any]) -> None:
        """Write summary.json: from now on the run is finished."""
        write_atomically(self.summary_file, json.dumps(final, indent=2) + "\n")


def new_run_dir(root: Path, name: str) -> Path:
    """A path under `root` that does not exist yet, from the time and the name."""
    base = root / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{name}"
    candidates = [base, *(base.with_name(f"{base.name}_{i}") for i in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted key -> value. An empty mapping is no key."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
