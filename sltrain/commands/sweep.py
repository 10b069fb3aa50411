"""A sweep: the same command over a grid of values, each run in a process and a folder of its own.

    sltrain-train -m model=llama_60m rank=64,128 sparsity=0.01,0.03 run_dir=outputs/sweep

    outputs/sweep/rank-64_sparsity-0.01/ ...      named by what varies; each is an ordinary run folder

Hydra expands the grid, and its launcher calls `run_job` for each point: one after the other here, or with
hydra/launcher=slurm on the nodes of a cluster. A process a job makes peak memory the job's own, lets a crash or an
out-of-memory kill cost one job, and needs no second way to train: a job is the plain command with its run_dir. Started
again with the same run_dir (alone: the grid is read from Hydra's record in the folder, multirun.yaml), the sweep finds
finished jobs finished and continues the others. What became of them is read from their folders, wherever they ran.
"""

import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override

from sltrain.commands.processes import in_words, run_process
from sltrain.compose import PLUGINS, parse_overrides, sweep_values
from sltrain.errors import ExitCode

MAX_PART = 60  # characters of a folder's name for one swept key


def with_swept_before(arguments: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """The arguments and, of them, the overrides, for `-m run_dir=FOLDER` without a model after those that the sweep in
    FOLDER was last started with; others unchanged. Raises ValueError for a folder without a record of a sweep."""
    parsed = parse_overrides(overrides)
    keys = {override.key_or_group: override for override in parsed}
    if "run_dir" not in keys or keys.keys() & {"model", "experiment"} or keys["run_dir"].is_sweep_override():
        return arguments, overrides
    folder = Path(str(keys["run_dir"].value())).expanduser()
    try:
        record = yaml.safe_load((folder / "multirun.yaml").read_bytes())
        texts = record["hydra"]["overrides"]
        before = [str(text) for text in [*texts["task"], *texts["hydra"]]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        keys_of_source = " and the keys of that run: with -m, init_from brings weights and tokenizer only"
        raise ValueError(
            f"run_dir={folder} holds no sweep to continue; to begin one there, choose a model: add model=NAME"
            + (keys_of_source if "init_from" in keys else "")
        ) from error
    before = [text for text in before if not text.startswith(("run_dir=", "hydra.sweep.dir=", "hydra.mode="))]
    return [*before, *arguments], [*before, *overrides]


def with_options_in_jobs(texts: list[str], overrides: list[str]) -> list[str]:
    """The texts (arguments, or overrides alone), with options of a swept plug-in as sweeps of one value: Hydra composes
    the rest once before the jobs, with the plug-in that is the default, which may not have them."""
    parsed = {override.input_line: override for override in parse_overrides(overrides)}
    swept = {override.key_or_group for override in parsed.values() if override.is_sweep_override()} & PLUGINS.keys()

    def in_jobs(text: str) -> str:
        override = parsed.get(text)
        if override is None or override.is_sweep_override() or not _is_option_of(override, swept):
            return text
        key, _, value = text.partition("=")
        return f"{key}=choice({value})"

    return [in_jobs(text) for text in texts]


def _is_option_of(override: Override, groups: Collection[str]) -> bool:
    group, dot, _ = override.key_or_group.partition(".")
    return bool(dot) and group in groups


@dataclass
class Sweep:
    """The plan of a sweep and, for jobs that ran here, how they ended."""

    folder: Path
    swept_keys: list[str]  # those that jobs are named by
    names: list[str]  # of the jobs, and of their folders
    codes: dict[str, int] = field(default_factory=dict)  # exit codes

    @classmethod
    def plan(cls, overrides: list[str]) -> "Sweep":
        """Read the grid from the overrides. Raises ValueError under torchrun, for a swept run_dir, and for
        SLURM where there is none."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "-m does not run under torchrun; start one torchrun a run, or the sweep on one process without torchrun"
            )
        parsed = parse_overrides(overrides)
        launchers = [override.value() for override in parsed if override.key_or_group == "hydra/launcher"]
        if launchers and "slurm" in str(launchers[-1]) and shutil.which("srun") is None:
            raise ValueError(
                f"hydra/launcher={launchers[-1]}, but there is no srun on the PATH: start the sweep where SLURM is"
            )
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
        groups = {override.key_or_group for override in swept}
        keys = [o.key_or_group for o in swept if not (_is_option_of(o, groups) and len(sweep_values(o)) == 1)]
        points = itertools.product(*(sweep_values(override) for override in swept))
        return cls(folder, keys, [job_name(parse_overrides(list(point)), keys) for point in points])

    @property
    def hydra_overrides(self) -> list[str]:
        """Where Hydra leaves its own record of the sweep (multirun.yaml)."""
        return [f'hydra.sweep.dir="{self.folder}"']

    def run_job(self) -> None:
        """Run the job that Hydra has just composed, in a process of its own, and say how it went. Here a signal, to
        this process or to the job, ends the sweep; on a cluster every job is on its own."""
        hydra = HydraConfig.get()
        overrides = [text for text in hydra.overrides.task if not text.startswith("run_dir=")]
        name = job_name(parse_overrides(overrides), self.swept_keys)
        place = f"[{self.names.index(name) + 1}/{len(self.names)}] {name}"
        print(f"\n{place}", flush=True)
        num_gpus = hydra.launcher.get("gpus_per_node") or 1
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}", "-m"]
        module = ["-m", *(torchrun if num_gpus > 1 else []), "sltrain.train"]
        code, is_stopped = run_process([sys.executable, *module, *overrides, f'run_dir="{self.folder / name}"'])
        self.codes[name] = code
        print(f"{place}: {in_words(code)}", flush=True)
        if is_stopped and hydra.launcher._target_.endswith("BasicLauncher"):
            raise SystemExit(ExitCode.INTERRUPTED)

    def finish(self) -> ExitCode:
        """Print the table of all jobs; FAILED if one failed or never ran, INTERRUPTED if the sweep was cut short."""
        from sltrain.api.report import read_rows
        from sltrain.reporting.table import text_table

        folders = {name: self.folder / name for name in self.names}
        rows, notes = read_rows([folder for folder in folders.values() if folder.is_dir()])
        print(f"\nsweep {self.folder}")
        print("\n".join([text_table(rows), *notes]) if rows else "no job has begun")
        ends = {row.name: row.status for row in rows}
        for name, code in self.codes.items():
            if code != ExitCode.INTERRUPTED or ends.get(name) != "finished":  # a signal may come when all is done
                ends[name] = in_words(code)
        left = {name: ends.get(name, "not started, or refused") for name in self.names if ends.get(name) != "finished"}
        for name, how in left.items():
            print(f"{name}: {how}")
        if left and (self.folder / ".submitit").is_dir():
            print(f"what the jobs printed is in {self.folder}/.submitit")
        if not left:
            print(f"sltrain-report {self.folder} makes a page of it")
            return ExitCode.OK
        if ExitCode.INTERRUPTED in self.codes.values():
            jobs = f"{len(left)} job{'s' * (len(left) != 1)}"
            print(f"interrupted with {jobs} to go; to continue: sltrain-train -m run_dir={self.folder}")
            return ExitCode.INTERRUPTED
        return ExitCode.FAILED


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
