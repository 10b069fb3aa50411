"""Kill, starve and corrupt small training runs, and see whether anything is lost.

python -m tests.faults run --seeds 0-9            schedules of five faults each, one run a seed
python -m tests.faults run --seeds 3 --starts commands      started as a user types it: slower, with torchrun
python -m tests.faults sweep                      a kill before every file operation of a whole run
python -m tests.faults predict                    goodput of 8, 64 and 1,024 GPUs at published failure rates
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from .campaign import Campaign, Record, append_line
from .predict import table
from .schedule import Fault, Schedule, draw
from .starts import STARTERS, import_once
from .world import RECIPES


def main() -> int:
    """The command; 0 if nothing was lost, 1 if something was, 2 for bad input."""
    arguments = _parser().parse_args()
    if arguments.command == "predict":
        print(table(arguments.save_seconds, arguments.restart_seconds))
        return 0
    import_once()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="faults_"))
    folder.mkdir(parents=True, exist_ok=True)
    out = Path(arguments.out) if arguments.out else folder / "verdicts.jsonl"
    if arguments.command == "run":
        schedules = [draw(seed, list(RECIPES), arguments.most_processes) for seed in arguments.seeds]
    else:
        schedules = _sweep(folder, arguments.recipe, arguments.every)
    lost = _run_all(schedules, folder, out, arguments.starts, arguments.jobs)
    print(f"verdicts: {out}")
    return 1 if lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="schedules of five faults each")
    run.add_argument("--seeds", type=_seeds, default=range(10), help="such as 7, 0-9 or 1,5,8-10 (default 0-9)")
    run.add_argument(
        "--most-processes", type=int, choices=(1, 2), default=2, help="1: no start has several (default 2)"
    )
    sweep = commands.add_parser("sweep", help="a kill before every file operation of a whole run")
    sweep.add_argument("--recipe", choices=RECIPES, default="sltrain")
    sweep.add_argument("--every", type=_at_least_one, default=1, help="only every so many-th operation")
    for command in (run, sweep):
        command.add_argument(
            "--starts", choices=STARTERS, default="forked", help="how a run is started (default forked)"
        )
        command.add_argument("--jobs", type=_at_least_one, default=1, help="schedules side by side (default 1)")
        command.add_argument("--out", help="file of JSON lines that verdicts are added to")
        command.add_argument("--folder", help="where runs are made; one that lost something stays there")
    predict = commands.add_parser("predict", help="goodput at published failure rates, without training")
    predict.add_argument("--save-seconds", type=float, default=30.0, help="that a save blocks training (default 30)")
    predict.add_argument("--restart-seconds", type=float, default=300.0, help="until training goes on (default 300)")
    return parser


def _seeds(text: str) -> list[int]:
    """0-3,7 -> [0, 1, 2, 3, 7]."""
    seeds = list[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            seeds += range(int(first), int(last or first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is no seed; write 7, 0-9 or 1,5,8-10") from None
    return seeds


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _sweep(folder: Path, recipe: str, every: int) -> list[Schedule]:
    """Schedules of one kill each, before each file operation of a run of one process."""
    total, _ = Campaign(folder / f"counting_{os.getpid()}").count_operations(recipe)
    print(f"{total} file operations in an undisturbed run of {recipe}")
    kills = [Fault("save", "kill", 0, "startup", operation) for operation in range(0, total, every)]
    return [Schedule(kill.at, recipe, 1, [kill]) for kill in kills]


def _run_all(schedules: list[Schedule], folder: Path, out: Path, starts: str, jobs: int) -> int:
    """Run the schedules in `jobs` processes, print a line of each and a table at the end; return how many lost
    something."""
    before = len(_records(out))
    workers = []
    for job in range(jobs):
        sys.stdout.flush()
        worker = os.fork()
        if worker == 0:
            _work(schedules[job::jobs], folder / f"worker_{os.getpid()}", out, starts)
        workers.append(worker)
    failed = [worker for worker in workers if os.waitpid(worker, 0)[1] != 0]
    records = _records(out)[before:]
    lost = [record for record in records if record["problems"]]
    print(_summary(records))
    missing = len(schedules) - len(records)
    if failed or missing:
        print(f"{missing} schedules have no verdict: the campaign itself failed", file=sys.stderr)
    return len(lost) + missing


def _work(schedules: list[Schedule], folder: Path, out: Path, starts: str) -> None:
    """Run schedules, one after the other. Does not return."""
    code = 1
    try:
        campaign = Campaign(folder, starts)
        for schedule in schedules:
            record = campaign.run(schedule)
            append_line(out, record)
            print(_line(record), flush=True)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _line(record: Record) -> str:
    schedule = record.schedule
    head = f"seed {schedule.seed}: {'LOST' if record.problems else 'nothing lost'}"
    numbers = f"{record.useful_updates} of {record.begun_updates} updates stay, {record.starts} starts"
    lines = [f"{head} ({schedule.recipe}, {schedule.processes} processes; {numbers}, {record.seconds:.0f} s)"]
    lines += [f"    {fault}" for fault in record.faults]
    lines += [f"    !! {problem}" for problem in record.problems]
    return "\n".join(lines)


def _records(out: Path) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in out.read_text().splitlines()]
    return []


def _summary(records: list[dict]) -> str:
    """The table of verdicts, and what was lost in all."""
    lines = [f"{'seed':>5} {'recipe':<18} {'faults':<58} {'starts':>6} {'goodput':>8} {'verdict'}"]
    for record in sorted(records, key=lambda record: record["schedule"]["seed"]):
        schedule = record["schedule"]
        kinds = " ".join(fault["kind"] for fault in schedule["faults"])
        goodput = f"{record['useful_updates'] / max(record['begun_updates'], 1):.0%}"
        verdict = "LOST" if record["problems"] else "nothing lost"
        lines.append(
            f"{schedule['seed']:>5} {schedule['recipe']:<18} {kinds:<58} {record['starts']:>6} {goodput:>8} {verdict}"
        )
    useful, begun = (sum(record[key] for record in records) for key in ("useful_updates", "begun_updates"))
    busy, needed = (sum(record[key] for record in records) for key in ("cpu_seconds", "useful_cpu_seconds"))
    survived = sum(not record["problems"] for record in records)
    lines.append(
        f"{survived} of {len(records)} schedules lost nothing; goodput: {useful / max(begun, 1):.1%} of updates,"
        f" {needed / max(busy, 1e-9):.1%} of processor time (starting included)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
