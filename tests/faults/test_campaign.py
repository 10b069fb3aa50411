"""Four schedules of the campaign, kills at file operations of a whole run, and whether a loss would be noticed."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults.campaign import Campaign, Undisturbed, damage
from faults.rates import LLAMA3_CAUSES, published_weights
from faults.schedule import (
    MAX_STEPS,
    NUM_FAULTS,
    SAVE_OPERATIONS,
    STARTUP_OPERATIONS,
    Fault,
    Schedule,
    draw,
)
from faults.starts import import_once
from faults.verdict import history_of, newest, problems_of_documents, problems_of_folder
from faults.world import RECIPES

WHOLE = ((1, MAX_STEPS),)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    import_once()
    return Campaign(tmp_path_factory.mktemp("campaign") / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_schedule_loses_nothing(seed: int, campaign: Campaign) -> None:
    record = campaign.run(draw(seed, list(RECIPES)))
    assert not record.problems, "\n".join([*record.faults, *record.problems])
    assert record.useful_updates == MAX_STEPS <= record.begun_updates


@pytest.mark.slow
def test_a_kill_before_a_file_operation_loses_nothing(campaign: Campaign) -> None:
    """Every 29th of a run; `python -m tests.faults sweep` takes all of them."""
    total, saves = campaign.count_operations("sltrain")
    assert total > 100 and max(map(len, saves[2:])) >= SAVE_OPERATIONS
    assert total - sum(map(len, saves)) >= STARTUP_OPERATIONS
    for operation in range(3, total, 29):
        record = campaign.run(Schedule(operation, "sltrain", 1, [Fault("save", "kill", 0, "startup", operation)]))
        assert not record.problems, (operation, record.problems)
        assert record.starts == 2, record.faults


@pytest.mark.slow
def test_a_kill_of_a_process_that_writes_its_share_loses_nothing(campaign: Campaign) -> None:
    kill = Fault("save", "kill", 8, "operation", 2, rank=1)
    record = campaign.run(Schedule(0, "sharded", 2, [kill]))
    assert not record.problems, record.problems
    assert record.starts == 2 and "-> start 1, at fsync checkpoints/step_00000008.tmp/__1_0.distcp" in record.faults[0]


@pytest.mark.slow
def test_a_kill_under_torchrun_loses_nothing(campaign: Campaign) -> None:
    """As a user starts it: torchrun, two processes, one of which dies; then `python -m sltrain train`."""
    commands = Campaign(campaign.folder / "commands", "commands")
    faults = [
        Fault("process", "kill", 7, "update", "backward", rank=1),
        Fault("processes", "kill", 10, "update", "after", detail=1, then="processes"),
    ]
    record = commands.run(Schedule(0, "dense", 2, faults))
    assert not record.problems, record.problems
    assert record.starts == 3, record.faults


@pytest.fixture(scope="module")
def undisturbed(campaign: Campaign) -> Undisturbed:
    return campaign.undisturbed_run("sltrain", WHOLE)


@pytest.mark.slow
def test_the_verdict_names_what_is_lost(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Copies of a whole run, each spoilt in one place."""

    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(undisturbed.folder, tmp_path / name, symlinks=True))

    assert problems_of_folder(spoilt("same"), undisturbed.folder) == []
    for file, words in (("model.safetensors", "of step_00000024 differs by"), ("state.json", "state.json of")):
        run = spoilt(file)
        path = newest(run) / file
        if file == "state.json":
            path.write_text(path.read_text().replace('"position": ', '"position": 1'))
        else:
            damage(path, "flipped", 0.9)
        (problem,) = problems_of_folder(run, undisturbed.folder)
        assert words in problem
    run = spoilt("log")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:5], *lines[3:]]))
    assert any("other train lines" in problem for problem in problems_of_folder(run, undisturbed.folder))
    run = spoilt("remains")
    (run / "checkpoints" / "step_00000008.tmp").mkdir()
    assert problems_of_folder(run, undisturbed.folder) == ["checkpoints/step_00000008.tmp is left"]
    run = spoilt("unfinished")
    (run / "summary.json").unlink()
    assert problems_of_folder(run, undisturbed.folder) == ["the run is not finished"]


@pytest.mark.slow
def test_documents_that_are_read_twice_or_not_are_named(undisturbed: Undisturbed) -> None:
    assert problems_of_documents(undisturbed.history, undisturbed.history, one_a_row=True) == []
    history = dict(undisturbed.history)
    history[5] = history[6]
    problems = problems_of_documents(history, undisturbed.history, one_a_row=True)
    assert problems[0] == "update 5 read other rows" and "72 documents" in problems[1]
    del history[5]
    (problem,) = problems_of_documents(history, undisturbed.history, one_a_row=True)
    assert "are in the weights" in problem
    assert history_of([]) == {}


def test_schedules() -> None:
    """A seed gives the same faults again, in the order of updates; over many seeds all classes come."""
    schedules = [draw(seed, list(RECIPES)) for seed in range(400)]
    assert schedules[7].as_json() == draw(7, list(RECIPES)).as_json() != schedules[8].as_json()
    json.dumps(schedules[7].as_json())
    faults = [fault for schedule in schedules for fault in schedule.faults]
    assert all(len(schedule.faults) == NUM_FAULTS for schedule in schedules)
    for schedule in schedules:
        steps = [fault.step for fault in schedule.faults]
        assert steps == sorted(set(steps)) and 1 <= steps[0] and steps[-1] < MAX_STEPS
    kinds = Counter(fault.kind for fault in faults)
    assert kinds.keys() >= {*published_weights(), "save", "torn", "full", "truncated", "flipped", "leftover", "clock"}
    assert 0.3 < kinds["process"] / len(faults) < 0.4  # half of the faults by the table, of which 0.69
    assert all(draw(seed, ["dense"], 1).processes == 1 for seed in range(50))
    in_saves = [(s.recipe, f) for s in schedules for f in s.faults if f.trigger in ("operation", "bytes")]
    assert {recipe for recipe, fault in in_saves if fault.rank} == {"sharded", "sharded_background"}


def test_published_weights() -> None:
    weights = published_weights()
    assert sum(sum(causes.values()) for causes in LLAMA3_CAUSES.values()) == 419
    assert sum(weights.values()) == pytest.approx(1)
    shares = {name: weight / (1 - weights["signal"]) for name, weight in weights.items() if name != "signal"}
    assert shares == pytest.approx(
        {"process": 0.754, "node": 0.124, "hang": 0.100, "gradient": 0.014, "read": 0.007}, abs=1e-3
    )
