"""Run folders are read from outside, whatever state they are in, and are left as they were."""

import hashlib
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sltrain.runs.lock import RunLock
from sltrain.runs.run_record import LEDGER, find_runs, read_run

CONFIG = {"model": {"name": "tiny"}, "method": {"name": "sltrain"}, "rank": 8, "sparsity": 0.03}
TRAIN = {"event": "train", "step": 1, "tokens": 64, "wall_seconds": 0.5, "loss": 6.0, "tokens_per_second": 128.0}
EVAL = {"event": "eval", "step": 2, "tokens": 128, "loss": 5.0, "perplexity": 148.4, "bits_per_byte": 2.0}
FINAL = {**EVAL, "event": "final", "step": 3}
LONG_AGO = time.time() - 3600

same_folder_each_time = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def make_run(folder: Path, *events: dict[str, Any], config: Any = CONFIG, tokenizer: str | None = "{}") -> Path:
    """A run folder with an old log."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    if events:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        written_long_ago(folder)
    return folder


def written_long_ago(run: Path) -> None:
    os.utime(run / "metrics.jsonl", (LONG_AGO, LONG_AGO))


def written_just_now(run: Path) -> None:
    os.utime(run / "metrics.jsonl")


# ---- finding


def test_runs_are_found_below_a_path_and_each_once(tmp_path: Path) -> None:
    names = ["b", "a/deep/run", "c", "report"]
    runs = [make_run(tmp_path / name, TRAIN) for name in names]
    make_run(tmp_path / "b" / "inside_a_run", TRAIN)
    make_run(tmp_path / ".hidden" / "run", TRAIN)
    make_run(tmp_path / "other_program", config={"model": "x"})
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "link_to_b").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    assert find_runs([tmp_path]) == sorted(runs)
    assert find_runs([tmp_path / "c", tmp_path, tmp_path / "c"]) == [runs[2], runs[1], runs[0], runs[3]]


def test_a_path_may_be_a_run_or_a_hidden_folder_or_a_link(tmp_path: Path) -> None:
    run = make_run(tmp_path / ".hidden" / "run")
    (tmp_path / "link").symlink_to(tmp_path / ".hidden")
    assert find_runs([run]) == [run]
    assert find_runs([tmp_path / ".hidden"]) == [run]
    assert find_runs([tmp_path / "link"]) == [tmp_path / "link" / "run"]
    assert find_runs([tmp_path]) == [tmp_path / "link" / "run"]
    assert find_runs([tmp_path / "nowhere", run / "config.yaml"]) == []


def test_runs_of_a_study_below_a_path_are_its_own(tmp_path: Path) -> None:
    """They are found where the study itself is named."""
    run = make_run(tmp_path / "run", TRAIN)
    own = make_run(tmp_path / "study" / "runs" / "a_trial-1_seed-1", TRAIN)
    (tmp_path / "study" / LEDGER).write_text("")
    studies: list[Path] = []
    assert find_runs([tmp_path], studies) == [run] and studies == [tmp_path / "study"]
    assert find_runs([tmp_path / "study"], studies) == [own] and len(studies) == 1
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / LEDGER).write_text("")  # without its runs nothing is left out
    assert find_runs([tmp_path], again := []) == [run] and again == [tmp_path / "study"]


@pytest.mark.parametrize("config", [None, "model: [", "\x00", "- a\n- b", "[" * 5000])
def test_a_run_without_a_readable_configuration_is_known_by_its_log(tmp_path: Path, config: str | None) -> None:
    run = make_run(tmp_path / "run", TRAIN, config=None)
    if config is not None:
        (run / "config.yaml").write_text(config)
    assert find_runs([tmp_path]) == [run]
    record = read_run(run)
    assert record.config == {} and record.train == [TRAIN]
    assert any("config.yaml" in note for note in record.notes)
    (run / "metrics.jsonl").write_text('{"loss": 3}\n')
    assert find_runs([tmp_path]) == []


# ---- reading


def test_everything_in_the_folder_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TRAIN, EVAL, {"event": "checkpoint", "step": 2}, FINAL, tokenizer="abc")
    (run / "summary.json").write_text(json.dumps(FINAL))
    record = read_run(run)
    assert (record.path, record.config, record.train, record.evals) == (run, CONFIG, [TRAIN], [EVAL])
    assert record.final == record.last == FINAL
    assert record.tokenizer_hash == hashlib.sha256(b"abc").hexdigest()
    assert record.status == "finished" and record.notes == []


def test_a_loss_that_was_not_finite_is_nan(tmp_path: Path) -> None:
    diverged = {**TRAIN, "loss": math.nan, "grad_norm": math.nan, "tokens_per_second": None}
    record = read_run(make_run(tmp_path / "run", diverged, {**EVAL, "perplexity": None}))
    assert record.notes == []
    read = [record.train[0]["loss"], record.train[0]["grad_norm"], record.evals[0]["perplexity"]]
    assert all(map(math.isnan, read)) and record.train[0]["tokens_per_second"] is None


def test_a_damaged_summary_is_made_up_for_by_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TRAIN, FINAL)
    (run / "summary.json").write_text('{"event": "fin')
    record = read_run(run)
    assert record.final == FINAL and record.status == "finished"
    assert len(record.notes) == 1 and "summary.json is damaged" in record.notes[0]


def test_a_missing_tokenizer_is_named_once_there_is_something_to_compare(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "empty", tokenizer=None)).notes == []
    record = read_run(make_run(tmp_path / "run", TRAIN, tokenizer=None))
    assert record.tokenizer_hash is None and "tokenizer.json" in record.notes[0]


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        '{"event": "train"}',
        '{"event": "train", "step": true}',
        '{"event": "train", "step": 1, "loss": "low"}',
        '{"event": "train", "step": 1, "tokens": Infinity}',
        '{"event": "train", "step": 1, "lr": "1e-3"}',
        '{"event": "eval", "step": 1, "perplexity": 1' + "0" * 400 + "}",
        "[" * 100_000,
    ],
)
def test_a_line_that_holds_no_event_is_damaged(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path / "run", TRAIN)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n{json.dumps(EVAL)}\n")
    written_long_ago(run)
    record = read_run(run)
    assert record.notes == ["metrics.jsonl: line 2 is damaged and skipped"]
    assert record.train == [TRAIN] and record.evals == [EVAL]


@same_folder_each_time
@given(cut=st.integers(0, 400))
def test_a_log_that_ends_anywhere_keeps_its_whole_lines(tmp_path: Path, cut: int) -> None:
    events = [TRAIN, EVAL, {**TRAIN, "step": 3}]
    text = "".join(json.dumps(event) + "\n" for event in events)[:cut]
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(text)
    written_long_ago(run)
    record = read_run(run)
    whole, rest = text.count("\n"), text.rpartition("\n")[2]
    whole += rest.endswith("}")  # all but the line's end
    assert record.train[:1] + record.evals + record.train[1:] == events[:whole]
    damaged = bool(rest) and not rest.endswith("}")
    assert record.notes == ([f"metrics.jsonl: line {whole + 1} is damaged and skipped"] if damaged else [])


@same_folder_each_time
@given(junk=st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=30)), max_size=6))
def test_junk_between_lines_costs_no_line(tmp_path: Path, junk: list[tuple[int, bytes]]) -> None:
    events = [{**TRAIN, "step": step} for step in range(4)]
    lines = [json.dumps(event).encode() for event in events]
    for place, text in junk:
        lines.insert(place, text.replace(b"\n", b"?"))
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    written_long_ago(run)
    record = read_run(run)
    assert record.train == events
    num_junk = sum(bool(text.replace(b"\n", b"?").strip()) for _, text in junk)
    assert bool(record.notes) == bool(num_junk)
    if num_junk > 3:
        assert f"and {num_junk - 3} more" in record.notes[0]


@same_folder_each_time
@given(
    name=st.sampled_from(["config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", ".lock"]),
    content=st.binary(max_size=200),
)
def test_no_content_of_any_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / name, TRAIN, EVAL)
    (run / name).write_bytes(content)
    find_runs([tmp_path])
    assert read_run(run).status


def test_a_folder_in_place_of_each_file_is_no_error(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", ".lock"):
        (tmp_path / "run" / name).mkdir(parents=True)
    record = read_run(tmp_path / "run")
    assert record.train == [] and len(record.notes) >= 3


def test_looking_changes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TRAIN)
    (run / ".lock").write_text("process 1 on elsewhere\n")
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    find_runs([tmp_path])
    read_run(run)
    after = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    assert after == before
    RunLock(run).release()  # it is free


# ---- status


def stopped(outcome: str) -> dict[str, Any]:
    return {"event": "stopped", "step": 2, "outcome": outcome}


@pytest.mark.parametrize("outcome", ["interrupted", "diverged", "out of memory", "data lost"])
def test_a_stopped_line_says_how_it_ended(tmp_path: Path, outcome: str) -> None:
    run = make_run(tmp_path / "run", TRAIN, stopped(outcome))
    written_just_now(run)
    assert read_run(run).status == outcome


def test_only_the_last_line_counts_as_an_end(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "run", TRAIN, stopped("interrupted"), {**TRAIN, "step": 3})).status == "crashed"


def test_what_has_no_end_crashed_and_what_has_no_line_never_began(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "a", TRAIN, EVAL)).status == "crashed"
    assert read_run(make_run(tmp_path / "b")).status == "not started"
    RunLock(tmp_path / "b").release()  # a process was there, and died before its first line
    assert read_run(tmp_path / "b").status == "crashed"
    (tmp_path / "b" / ".lock").write_text("process 1 on elsewhere\n")
    assert read_run(tmp_path / "b").status == "running", "nobody can know yet"
    os.utime(tmp_path / "b" / "config.yaml", (LONG_AGO, LONG_AGO))
    assert read_run(tmp_path / "b").status == "crashed"
    run = make_run(tmp_path / "c")
    (run / "metrics.jsonl").write_text('{"event": "tr')
    written_long_ago(run)
    assert read_run(run).status == "crashed"


def test_a_held_lock_means_running_whatever_the_log_says(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TRAIN, stopped("interrupted"))
    lock = RunLock(run)
    assert read_run(run).status == "running"
    lock.release()
    assert read_run(run).status == "interrupted"
    (run / "summary.json").write_text(json.dumps(FINAL))
    lock = RunLock(run)  # a finished run that somebody starts again is refused soon
    assert read_run(run).status == "finished"
    lock.release()


@pytest.mark.parametrize("owner", ["elsewhere", None])
def test_a_fresh_log_means_running_where_the_lock_cannot_be_seen(tmp_path: Path, owner: str | None) -> None:
    run = make_run(tmp_path / "run", TRAIN)
    if owner:
        (run / ".lock").write_text(f"process 1 on {owner}\n")
    assert read_run(run).status == "crashed"
    written_just_now(run)
    record = read_run(run)
    assert record.status == "running" and "assumed to be running" in record.notes[0]


def test_a_free_lock_of_this_machine_is_believed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TRAIN)
    written_just_now(run)
    (run / ".lock").write_text(f"process 1 on {socket.gethostname()}\n")
    assert read_run(run).status == "crashed"
