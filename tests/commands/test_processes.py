"""Commands in processes: how they end, how many run at once, and what a signal does."""

import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from sltrain.commands.processes import Job, in_words, run_process, run_processes
from sltrain.signals import stop_signals


def test_exit_codes_in_words() -> None:
    words = {0: "finished", -9: "failed (exit code -9)", 5: "diverged (exit code 5)", 2: "refused (exit code 2)"}
    assert {code: in_words(code) for code in words} == words


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", (0, False)),
        ("import sys; sys.exit(2)", (2, False)),
        ("import sys; sys.exit(3)", (3, True)),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", (3, True)),
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)", (3, True)),
    ],
)
def test_a_signal_to_the_sweep_or_to_its_job_ends_the_sweep(code: str, expected: tuple[int, bool]) -> None:
    assert run_process([sys.executable, "-c", code]) == expected


def test_a_log_that_cannot_be_opened_leaves_signals_as_they_were(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in stop_signals()}
    with pytest.raises(OSError):
        run_process([sys.executable, "-c", "pass"], tmp_path / "nowhere" / "log")
    assert {number: signal.getsignal(number) for number in before} == before


def python(code: str, log: Path | None = None) -> Job:
    return Job([sys.executable, "-c", code], log)


def test_as_many_run_at_once_as_there_are_places_each_with_its_environment(tmp_path: Path) -> None:
    """Each writes its place, and waits until both places of its pair have written; one at a time would never end."""
    code = """
import os, pathlib, sys, time
folder, pair = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / f"{pair}-{os.environ['PLACE']}").touch()
while len(list(folder.glob(f"{pair}-*"))) < 2:
    time.sleep(0.01)
print("seen")
"""
    jobs = [
        Job([sys.executable, "-c", code, str(tmp_path), pair], tmp_path / f"{number}.log")
        for number, pair in enumerate("aabb")
    ]
    taken: list[int] = []
    lazily = (taken.append(number) or job for number, job in enumerate(jobs))  # type: ignore[func-returns-value]
    places = [{"PLACE": "0"}, {"PLACE": "1"}]
    ended = []
    for job, code_of_job, is_stopped in run_processes(lazily, places):
        ended.append((job.log, code_of_job, is_stopped))
        assert len(taken) <= len(ended) + 1, "no job is taken before a place is free"
    assert sorted(ended, key=str) == [(job.log, 0, False) for job in jobs]
    assert {file.name for file in tmp_path.glob("?-?")} == {"a-0", "a-1", "b-0", "b-1"}
    assert all(job.log is not None and job.log.read_text() == "seen\n" for job in jobs)


def test_a_signal_stops_all_that_run_and_starts_no_other(tmp_path: Path) -> None:
    from_parent = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    jobs = [python("import time; time.sleep(60)"), python(from_parent), python(f"open({str(tmp_path / 'x')!r}, 'w')")]
    begin = time.monotonic()
    assert [(code, is_stopped) for _, code, is_stopped in run_processes(jobs, [{}, {}])] == [(3, True)] * 2
    assert time.monotonic() - begin < 50 and not (tmp_path / "x").exists()


def test_closed_early_it_stops_those_that_run_and_signals_are_as_before() -> None:
    before = {number: signal.getsignal(number) for number in stop_signals()}
    begin = time.monotonic()
    with closing(run_processes([python("pass"), python("import time; time.sleep(60)")], [{}, {}])) as ended:
        assert next(ended)[1:] == (0, False)
    assert time.monotonic() - begin < 50
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_wish_to_stop_between_two_jobs_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in run_processes([python("pass"), python("pass")]):
            signal.raise_signal(signal.SIGTERM)
