"""A sweep: the same command over a grid of values, one run after the other, each in a process and a folder of its own.

    sltrain-train -m model=llama_60m rank=64,128 sparsity=0.01,0.03 run_dir=outputs/sweep

    outputs/sweep/rank-64_sparsity-0.01/ ...      named by what varies; each is an ordinary run folder

Hydra expands the grid and calls `run_job` for each point. A process a job makes peak memory the job's own, lets a
crash or an out-of-memory kill cost one job, and needs no second way to train: a job is the plain command with its
run_dir. Started again with the same run_dir, the sweep finds finished jobs finished and continues the others.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override

from sltrain.compose import parse_overrides, sweep_values
from sltrain.errors import ExitCode

MAX_PART = 60  # characters of a folder's name for one swept key


@dataclass
class Sweep:
    """The plan of a sweep and, as its jobs end, their results."""

    folder: Path
    swept_keys: list[str]
    num_jobs: int
    results: list[tuple[str, ExitCode | int, dict[str, Any]]] = field(
        default_factory=list
    )  # (name, exit code, final line)

    @classmethod
    def plan(cls, overrides: list[str]) -> "Sweep":
        """Read the grid from the overrides. Raises ValueError under torchrun and for a swept run_dir."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "-m does not run under torchrun; start one torchrun a run, or the sweep on one process without torchrun"
            )
        parsed = parse_overrides(overrides)
        swept = [override for override in parsed if override.is_sweep_override()]
        if any(override.key_or_group == "run_dir" for override in swept):
            raise ValueError("run_dir cannot be swept; it names the sweep's folder, each job has a folder in it")
        given = [override.value() for override in parsed if override.key_or_group == "run_dir"]
        name = given[-1] if given and given[-1] else f"outputs/sweep_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        folder = Path(str(name)).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"run_dir={folder} is a file; name a folder for the sweep")
        if re.search(r'["\\$]', str(folder)):
            raise ValueError(f"run_dir={folder}: the folder of a sweep must do without quotes, backslashes and $")
        num_jobs = math.prod(len(sweep_values(override)) for override in swept)
        return cls(folder, [override.key_or_group for override in swept], num_jobs)

    @property
    def hydra_overrides(self) -> list[str]:
        """Where Hydra leaves its own record of the sweep (multirun.yaml)."""
        return [f'hydra.sweep.dir="{self.folder}"']

    def run_job(self) -> None:
        """Run the job that Hydra has just composed, in a process of its own, and say how it went. A signal, to this
        process or to the job, ends the sweep."""
        overrides = [text for text in HydraConfig.get().overrides.task if not text.startswith("run_dir=")]
        name = job_name(parse_overrides(overrides), self.swept_keys)
        folder = self.folder / name
        place = f"[{len(self.results) + 1}/{self.num_jobs}] {name}"
        print(f"\n{place}", flush=True)
        command = [sys.executable, "-m", "sltrain.train", *overrides, f'run_dir="{folder}"']
        code, is_stopped = _run_process(command)
        self.results.append((name, code, _read_summary(folder) if code == ExitCode.OK else {}))
        print(f"{place}: {_result(*self.results[-1][1:])}", flush=True)
        if is_stopped:
            raise SystemExit(ExitCode.INTERRUPTED)

    def finish(self) -> ExitCode:
        """Print the table of all jobs; FAILED if one failed or never ran, INTERRUPTED if the sweep was cut short."""
        width = max((len(name) for name, _, _ in self.results), default=0)
        print(f"\nsweep {self.folder}")
        for name, code, final in self.results:
            print(f"  {name:{width}}  {_result(code, final)}")
        codes, num_missing = {code for _, code, _ in self.results}, self.num_jobs - len(self.results)
        if num_missing and codes <= {ExitCode.OK, ExitCode.INTERRUPTED} or ExitCode.INTERRUPTED in codes:
            print(f"interrupted with {num_missing} jobs to go; the same command with run_dir={self.folder} continues")
            return ExitCode.INTERRUPTED
        return ExitCode.OK if codes <= {ExitCode.OK} and not num_missing else ExitCode.FAILED


def job_name(overrides: list[Override], swept_keys: list[str]) -> str:
    """`rank-64_sparsity-0.01`: the swept keys in the order typed, in characters that need no quoting. Where that loses
    a character, a hash keeps two values apart."""
    values = {override.key_or_group: override.get_value_element_as_str() for override in overrides}
    parts = []
    for key in swept_keys:
        part = f"{key}-{values[key]}"
        plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", part)
        keeps_all = plain == part and len(part) <= MAX_PART
        parts.append(part if keeps_all else f"{plain[:MAX_PART]}-{sha256(part.encode()).hexdigest()[:6]}")
    return "_".join(parts) or "job"


def _run_process(command: list[str]) -> tuple[int, bool]:
    """Run a job; return its exit code (INTERRUPTED if a signal ended it) and whether the sweep is to stop.

    The job is asked to stop with SIGTERM: a terminal's Ctrl-C has reached it already, and a second SIGINT would end it
    without saving.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command)
        if received:  # before there was a process to ask
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code != ExitCode.OK and (received or code in (ExitCode.INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)):
            code = ExitCode.INTERRUPTED
        return code, bool(received) or code == ExitCode.INTERRUPTED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _read_summary(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


def _result(code: int, final: dict[str, Any]) -> str:
    """A job's outcome in one line."""
    if code != ExitCode.OK:
        known = {ExitCode.INTERRUPTED: "interrupted", ExitCode.DIVERGED: "diverged", ExitCode.BAD_INPUT: "refused"}
        return f"{known.get(ExitCode(code), 'failed') if code in set(ExitCode) else 'failed'} (exit code {code})"
    if not final:
        return "finished, but its summary.json cannot be read"
    perplexity = math.inf if final["perplexity"] is None else final["perplexity"]
    return (
        f"perplexity {perplexity:.2f}  {final['num_parameters']['total'] / 1e6:.1f}M parameters"
        f"  peak {final['peak_memory_bytes'] / 1e9:.2f} GB  {final['wall_seconds']:.0f} s"
    )
