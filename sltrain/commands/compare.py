"""`sltrain-compare`: a study of candidates, each tuned by as many trials, with intervals over paired seeds.

    sltrain-compare study=first dry_run=true       what it would cost; nothing is run
    sltrain-compare study=first                    runs it, or goes on with it: outputs/studies/first/study.md
    sltrain-compare study=headline data=local path='wiki/train.*.gz' validation_path='wiki/validation.*.gz'
    sltrain-compare study=first jobs=8             eight runs at once, each on a GPU or on a share of the CPU
    sltrain-compare study=my_study.yaml            a study of your own, laid out as conf/study/first.yaml
    sltrain-report --study outputs/studies/first   draws the page again, from the ledger alone

Each run has a process and a folder of its own in RUN_DIR/runs, what it prints beside it, and a line in
RUN_DIR/ledger.jsonl when it has ended. A study that was stopped, or killed, goes on when the same command is typed
again. A run that diverges counts as infinite. Any other failure ends the study, to be mended first.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sltrain.api.ledger import Ledger, draw_study, entry_of, machine_name, open_ledger, study_table
from sltrain.api.study import Study, StudyRun, positions
from sltrain.api.study_file import COMPARE, folder_of_study, read_arguments
from sltrain.commands.help_text import help_text
from sltrain.commands.processes import Job, in_words, run_processes
from sltrain.config import num_steps
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on
from sltrain.reporting.study import Entry, chosen_trial, counted, finalists, setting_text
from sltrain.reporting.table import Table, aligned, duration, perplexity, short


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command, "interrupted; the same command goes on")


@lines_on("stdout")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-compare` with these arguments and return its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{help_text(COMPARE)}")
        return ExitCode.OK
    try:
        settings, study = read_arguments(arguments)
        folder = folder_of_study(settings, study)
        ledger = open_ledger(folder, study, writes=not settings.dry_run)
        try:
            work = Work(study, ledger, places(settings.jobs))
            print(work.cost(), flush=True)
            return ExitCode.OK if settings.dry_run else work.run()
        finally:
            ledger.close()
    except Exception as error:
        return report_error(error)


def places(jobs: int) -> list[dict[str, str]]:
    """The environment of each of so many runs at once: a GPU, where there are some, and a share of the CPU's threads,
    unless OMP_NUM_THREADS says how many."""
    import torch

    if jobs == 1:
        return [{}]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    typed = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP takes a number for each level
    threads = typed if typed.isdigit() else str(max(1, torch.get_num_threads() // jobs))
    shares = [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {} for place in range(jobs)]
    return [{**share, "OMP_NUM_THREADS": threads} for share in shares]


@dataclass
class RunJob(Job):
    """A run that was begun."""

    run: StudyRun = field(kw_only=True)
    begin: float = field(kw_only=True)  # time.monotonic
    said_before: int = field(kw_only=True)  # bytes of its log


class Work:
    """The runs of a study that are still to be made, as many at once as there are places."""

    def __init__(self, study: Study, ledger: Ledger, places: Sequence[dict[str, str]]) -> None:
        self.study, self.ledger, self.places = study, ledger, places
        self.num_begun = 0

    def cost(self) -> str:
        """What the whole study takes, and what of it is left."""
        file, configs = self.study.file, {name: self.study.configs[name, 1] for name in self.study.file.candidates}
        sizes = {name: self.study.size_of(name) for name in configs}
        headings = ["candidate", "trials", "updates a run", "positions a run", "parameters", "FLOPs a token"]
        rows = []
        for name, config in configs.items():
            tune = " x ".join(f"{key} {len(values)}" for key, values in file.candidates[name].tune.items())
            size = sizes[name]
            numbers = [short(size.parameters), f"{size.flops_per_token / 1e6:.3g}M"] if size else ["?", "?"]
            rows.append([name, tune or "-", f"{num_steps(config):,}", f"{positions(config):,}", *numbers])
        updates = self.study.updates_of()
        tokens = {name: count * positions(configs[name]) // num_steps(configs[name]) for name, count in updates.items()}
        arithmetic = [size.flops_per_token * tokens[name] for name, size in sizes.items() if size]
        flops = f", {sum(arithmetic):.2g} FLOPs" if len(arithmetic) == len(sizes) else ""
        screening = f" with {' '.join(file.screening)}, the best {file.finalists} in whole," if file.screening else ""
        return (
            f"study      {self.study.name}: {len(rows)} candidates x {counted(file.trials, 'trial')} x"
            f" {counted(len(file.tuning_seeds), 'tuning seed')}{screening} on validation half a, then x"
            f" {counted(len(file.reporting_seeds), 'reporting seed')} on half b\n"
            f"{aligned(Table(headings, rows, headings[:2]))}\n"
            f"cost       {self.study.num_runs} runs, {sum(updates.values()):,} updates,"
            f" {short(sum(tokens.values()))} positions{flops}; {self._left()}"
        )

    def _done(self) -> list[Entry]:
        return [entry for entry in self.ledger.runs.values() if entry.candidate in self.study.file.candidates]

    def _left(self) -> str:
        """How many runs are left and, once one is done, for how long."""
        done = self._done()
        left = self.study.num_runs - len(done)
        timed = [entry for entry in done if entry.seconds and entry.updates]
        if not left or not timed:
            return f"{counted(left, 'run')} left" if done else "the first run will tell the time"
        rates = {name: _rate([e for e in timed if e.candidate == name] or timed) for name in self.study.file.candidates}
        updates = self.study.updates_of()
        for entry in done:
            updates[entry.candidate] -= num_steps(self.study.config(entry.role, entry.candidate, 1))
        seconds = sum(rates[name] * updates[name] for name in rates) / len(self.places)
        return f"{counted(left, 'run')} left, about {duration(seconds)}"

    def run(self) -> ExitCode:
        """Make every run that is not in the ledger, and draw the page after each part. Returns how that ended."""
        folder = self.ledger.folder
        study = self.study
        for runs in (
            study.screening_runs,
            lambda: study.tuning_runs(self._finalists()),
            lambda: study.reporting_runs(self._chosen()),
        ):
            todo = [run for run in runs() if run.key not in self.ledger.runs]
            if (code := self._make(todo)) != ExitCode.OK:
                return code
            page = draw_study(self.ledger, folder, f"sltrain-report --study {folder}")
        table = study_table(self.ledger)
        print(f"\n{aligned(table)}\npage: {page}" if table else f"page: {page}", flush=True)
        return ExitCode.OK

    def _finalists(self) -> dict[str, list[int]]:
        """The trials of each candidate that are made in whole."""
        entries = list(self.ledger.runs.values())
        return {name: finalists(self.ledger.for_page, entries, name) for name in self.study.file.candidates}

    def _chosen(self) -> dict[str, int]:
        """The trial of each candidate that is reported."""
        entries, chosen = list(self.ledger.runs.values()), {}
        for name in self.study.file.candidates:
            trial = chosen_trial(self.ledger.for_page, entries, name)
            assert trial is not None, "all trials are done"
            chosen[name] = trial
        return chosen

    def _make(self, runs: Sequence[StudyRun]) -> ExitCode:
        """Each run in a process of its own, continued if it was begun, and its line in the ledger."""
        self.num_begun = len(self._done())
        with closing(run_processes(map(self._begin, runs), self.places)) as ended:
            for job, code, is_stopped in ended:
                if (result := self._end(job, code, is_stopped)) != ExitCode.OK:
                    return result
        return ExitCode.OK

    def _begin(self, run: StudyRun) -> RunJob:
        folder = self._folder(run)
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.num_begun += 1
        place = f"[{self.num_begun}/{self.study.num_runs}] {run.role} {run.candidate}, seed {run.seed}"
        print(f"{place}: {setting_text(run.setting)}", flush=True)
        command = [sys.executable, "-m", "sltrain.train", *run.overrides, f'run_dir="{folder}"']
        said_before = log.stat().st_size if log.exists() else 0
        return RunJob(command, log, run=run, begin=time.monotonic(), said_before=said_before)

    def _end(self, job: RunJob, code: int, is_stopped: bool) -> ExitCode:
        is_done = code in (ExitCode.OK, ExitCode.DIVERGED)
        if is_done:
            self._record(job)
        if is_stopped:
            print(f"interrupted; {self._left()}; the same command goes on", flush=True)
            return ExitCode.INTERRUPTED
        return ExitCode.OK if is_done else report_error(ValueError(self._failure(job, code)))

    def _record(self, job: RunJob) -> None:
        run = job.run
        machine = self._machine(self.study.config(run.role, run.candidate, run.trial).device)
        entry = entry_of(run, self._folder(run), time.monotonic() - job.begin, machine)
        self.ledger.add(entry)
        name = f"{run.name}: " * (len(self.places) > 1)
        result = f"perplexity {perplexity(math.exp(entry.loss))}" if math.isfinite(entry.loss) else "diverged"
        print(f"    {name}{result}; {self._left()}", flush=True)

    def _failure(self, job: RunJob, code: int) -> str:
        log = self._folder(job.run).with_suffix(".log")
        said = log.read_bytes()[job.said_before :].decode(errors="replace").strip().splitlines() or ["it said nothing"]
        reason = next((line for line in reversed(said) if line.startswith("error: ")), said[-1])
        return f"{job.run.name} {in_words(code)}: {reason.removeprefix('error: ')} (all of it: {log})"

    def _folder(self, run: StudyRun) -> Path:
        return self.ledger.folder_of(run)

    def _machine(self, device: str) -> str:
        threads = self.places[0].get("OMP_NUM_THREADS")
        at_once = f", {len(self.places)} runs at once" * (len(self.places) > 1)
        return machine_name(device, threads) + at_once


def _rate(entries: list[Entry]) -> float:
    """Seconds an update, the start of the process included."""
    return sum(entry.seconds or 0.0 for entry in entries) / sum(entry.updates for entry in entries)


if __name__ == "__main__":
    main()
