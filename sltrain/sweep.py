"""A sweep: the same command over a grid of values, one run after the other, each in a process and a folder of its own.

    sltrain-train -m model=llama_60m rank=64,128 sparsity=0.01,0.03 run_dir=outputs/sweep

    outputs/sweep/rank-64_sparsity-0.01/ ...      named by what varies; each is an ordinary run folder

Hydra expands the grid and calls `run_job` for each point. A process a job makes peak memory the job's own, lets a
crash or an out-of-memory kill cost one job, and needs no second way to train: a job is the plain command with its
run_dir. Started again with the same run_dir, the sweep finds finished jobs finished and continues the others.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override

from sltrain.compose import parse_overrides
from sltrain.errors import ExitCode


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
        typed = [
            override.value() for override in parsed if override.key_or_group == "run_dir" and override not in swept
        ]
        folder = (
            Path(str(typed[-1]))
            if typed and typed[-1]
            else Path("outputs", f"sweep_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        )
        num_jobs = 1
        for override in swept:
            num_jobs *= len(list(override.sweep_string_iterator()))
        return cls(folder.expanduser(), [override.key_or_group for override in swept], num_jobs)

    @property
    def hydra_overrides(self) -> list[str]:
        """Where Hydra leaves its own record of the sweep (multirun.yaml)."""
        return [f'hydra.sweep.dir="{self.folder}"']

    def run_job(self) -> None:
        """Run the job that Hydra has just composed, in a process of its own, and say how it went. An interrupted job
        ends the sweep."""
        overrides = [text for text in HydraConfig.get().overrides.task if not text.startswith("run_dir=")]
        name = job_name(parse_overrides(overrides), self.swept_keys)
        folder = self.folder / name
        print(f"\n[{len(self.results) + 1}/{self.num_jobs}] {name}", flush=True)
        command = [sys.executable, "-m", "sltrain.train", *overrides, f'run_dir="{folder}"']
        with subprocess.Popen(command) as process, _forwarding_signals(process):
            code = process.wait()
        summary = folder / "summary.json"
        final = json.loads(summary.read_text()) if code == ExitCode.OK and summary.exists() else {}
        self.results.append((name, code, final))
        print(f"[{len(self.results)}/{self.num_jobs}] {name}: {_result(code, final)}", flush=True)
        if code == ExitCode.INTERRUPTED:
            raise SystemExit(code)

    def finish(self) -> ExitCode:
        """Print the table of all jobs; FAILED if one failed, INTERRUPTED if the sweep was cut short."""
        width = max((len(name) for name, _, _ in self.results), default=0)
        print(f"\nsweep {self.folder}")
        for name, code, final in self.results:
            print(f"  {name:{width}}  {_result(code, final)}")
        codes = {code for _, code, _ in self.results}
        if ExitCode.INTERRUPTED in codes:
            print(
                f"interrupted with {self.num_jobs - len(self.results)} jobs to go;"
                f" the same command with run_dir={self.folder} continues"
            )
            return ExitCode.INTERRUPTED
        return ExitCode.OK if codes <= {ExitCode.OK} else ExitCode.FAILED


def job_name(overrides: list[Override], swept_keys: list[str]) -> str:
    """`rank-64_sparsity-0.01`: the swept keys in the order typed, in characters that need no quoting."""
    values = {override.key_or_group: override.get_value_element_as_str() for override in overrides}
    parts = [f"{key}-{values[key]}" for key in swept_keys]
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part) for part in parts) or "job"


def _result(code: int, final: dict[str, Any]) -> str:
    if code != ExitCode.OK:
        known = {ExitCode.INTERRUPTED: "interrupted", ExitCode.DIVERGED: "diverged", ExitCode.BAD_INPUT: "refused"}
        return f"{known.get(ExitCode(code), 'failed') if code in set(ExitCode) else 'failed'} (exit code {code})"
    return (
        f"perplexity {final['perplexity']:.2f}  {final['num_parameters']['total'] / 1e6:.1f}M parameters"
        f"  peak {final['peak_memory_bytes'] / 1e9:.2f} GB  {final['wall_seconds']:.0f} s"
    )


@contextmanager
def _forwarding_signals(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """While a job runs, a signal to the sweep asks the job to save and stop. Always as SIGTERM: a terminal's Ctrl-C
    has reached the job already, and a second SIGINT would end it without saving."""

    def forward(number: int, frame: object) -> None:
        process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
