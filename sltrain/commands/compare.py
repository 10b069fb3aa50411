"""`sltrain-compare`: a study of candidates, each tuned by as many trials, with intervals over paired seeds.

    sltrain-compare study=first dry_run=true       what it would cost; nothing is run
    sltrain-compare study=first                    runs it, or goes on with it: outputs/studies/first/study.md
    sltrain-compare study=headline data=local path='wiki/train.*.gz' validation_path='wiki/validation.*.gz'
    sltrain-compare study=my_study.yaml            a study of your own, laid out as conf/study/first.yaml
    sltrain-report --study outputs/studies/first   draws the page again, from the ledger alone

Each run has a process and a folder of its own in RUN_DIR/runs, what it prints beside it, and a line in
RUN_DIR/ledger.jsonl when it has ended. A study that was stopped, or killed, goes on when the same command is typed
again. A run that diverges counts as infinite. Any other failure ends the study, to be mended first.
"""

import math
import sys
import time

from sltrain.api.ledger import Ledger, draw_study, entry_of, open_ledger, study_table
from sltrain.api.study import COMPARE, Study, StudyRun, folder_of_study, positions, read_arguments, size_of
from sltrain.commands.help_text import help_text
from sltrain.commands.sweep import in_words, run_process
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
            work = Work(study, ledger)
            print(work.cost(), flush=True)
            return ExitCode.OK if settings.dry_run else work.run()
        finally:
            ledger.close()
    except Exception as error:
        return report_error(error)


class Work:
    """The runs of a study that are still to be made, one after the other."""

    def __init__(self, study: Study, ledger: Ledger) -> None:
        self.study, self.ledger = study, ledger

    def cost(self) -> str:
        """What the whole study takes, and what of it is left."""
        file, configs = self.study.file, {name: self.study.configs[name, 1] for name in self.study.file.candidates}
        sizes = {name: size_of(config) for name, config in configs.items()}
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

    def _left(self) -> str:
        """How many runs are left and, once one is done, for how long."""
        done = [entry for entry in self.ledger.runs.values() if entry.candidate in self.study.file.candidates]
        left = self.study.num_runs - len(done)
        timed = [entry for entry in done if entry.seconds and entry.updates]
        if not left or not timed:
            return f"{counted(left, 'run')} left" if done else "the first run will tell the time"
        rates = {name: _rate([e for e in timed if e.candidate == name] or timed) for name in self.study.file.candidates}
        updates = self.study.updates_of()
        for entry in done:
            updates[entry.candidate] -= num_steps(self.study.config(entry.role, entry.candidate, 1))
        return f"{counted(left, 'run')} left, about {duration(sum(rates[name] * updates[name] for name in rates))}"

    def run(self) -> ExitCode:
        """Make every run that is not in the ledger, and draw the page after each part. Returns how that ended."""
        folder = self.ledger.folder
        study = self.study
        for runs in (
            study.screening_runs,
            lambda: study.tuning_runs(self._finalists()),
            lambda: study.reporting_runs(self._chosen()),
        ):
            for run in runs():
                if run.key not in self.ledger.runs and (code := self._make(run)) != ExitCode.OK:
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

    def _make(self, run: StudyRun) -> ExitCode:
        """One run in a process of its own, continued if it was begun, and its line in the ledger."""
        folder = self.ledger.folder / "runs" / run.name
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        place = f"[{len(self.ledger.runs) + 1}/{self.study.num_runs}] {run.role} {run.candidate}, seed {run.seed}"
        print(f"{place}: {setting_text(run.setting)}", flush=True)
        begin, said_before = time.monotonic(), log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "sltrain.train", *run.overrides, f'run_dir="{folder}"']
        code, is_stopped = run_process(command, log)
        if is_stopped:
            print(f"interrupted; {self._left()}; the same command goes on", flush=True)
            return ExitCode.INTERRUPTED
        if code not in (ExitCode.OK, ExitCode.DIVERGED):
            said = log.read_bytes()[said_before:].decode(errors="replace").strip().splitlines() or ["it said nothing"]
            reason = next((line for line in reversed(said) if line.startswith("error: ")), said[-1])
            reason = reason.removeprefix("error: ")
            return report_error(ValueError(f"{run.name} {in_words(code)}: {reason} (all of it: {log})"))
        config = self.study.config(run.role, run.candidate, run.trial)
        entry = entry_of(run, folder, time.monotonic() - begin, config.device)
        self.ledger.add(entry)
        result = f"perplexity {perplexity(math.exp(entry.loss))}" if math.isfinite(entry.loss) else "diverged"
        print(f"    {result}; {self._left()}", flush=True)
        return ExitCode.OK


def _rate(entries: list[Entry]) -> float:
    """Seconds an update, the start of the process included."""
    return sum(entry.seconds or 0.0 for entry in entries) / sum(entry.updates for entry in entries)


if __name__ == "__main__":
    main()
