"""What Trackio's own storage holds of a run: the numbers of metrics.jsonl, once each, after a run that went on too."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sltrain.engine.trackio import TrackioSink

# Trackio reads where it stores when it is imported, so each step of a run is a process of its own.
PROCESS = """
import json, sys
from pathlib import Path
from sltrain.engine.trackio import TrackioSink
from sltrain.log import lines_on
assert "trackio" not in sys.modules
with lines_on("stdout"):
    sink = TrackioSink(Path(sys.argv[1]), project="p", space_id=None, config={"rank": 8, "model": {"name": "tiny"}})
for event in json.loads(sys.argv[2]):
    sink.log(event)
sink.close()
sink.log({"event": "train", "step": 99})
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("p")
lines = SQLiteStorage.get_logs("p", name)
lines = [{key: value for key, value in line.items() if key != "timestamp"} for line in lines]
print(json.dumps([name, lines, SQLiteStorage.get_run_config("p", name)["rank"]]))
"""


def test_a_run_that_goes_on_is_the_same_run_with_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "my_run"
    folder.mkdir()
    tasks = {"piqa": {"acc": 0.5}}
    parts = [
        [{"event": "train", "step": step, "loss": 5.0 - step} for step in (1, 2, 3, 4)],  # killed; saved at 2
        [
            {"event": "train", "step": 3, "loss": 2.0},
            {"event": "train", "step": 4, "loss": 1.0},
            {"event": "train", "step": 5, "loss": math.nan},
            {"event": "final", "step": 5, "loss": 0.5, "tasks": tasks},
        ],
    ]
    said = []
    for part in parts:
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, str(folder), json.dumps(part)], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        line, answer = done.stdout.splitlines()
        said.append(json.loads(answer))
        assert line == f"Trackio: run {said[-1][0]}, `trackio show --project p`"
    assert said[0][0] == said[1][0] == (folder / "trackio_name").read_text().strip()
    assert said[0][0].startswith("my_run-") and said[1][2] == 8
    assert [(line["step"], str(line.get("train/loss"))) for line in said[1][1]] == [
        (1, "4.0"),
        (2, "3.0"),
        (3, "2.0"),
        (4, "1.0"),
        (5, "nan"),
        (5, "None"),
    ]
    assert said[1][1][-1] == {"step": 5, "final/loss": 0.5, "final/tasks/piqa/acc": 0.5}


def test_what_trackio_refuses_is_one_line_and_what_it_cannot_begin_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackio = pytest.importorskip("trackio")
    options = {"space_id": None, "config": {}}
    with pytest.raises(ValueError, match="tracker=trackio: Project name 'registry-x' is not allowed"):
        TrackioSink(tmp_path, project="registry-x", **options)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(trackio, "init", broken)
    sink = TrackioSink(tmp_path, project="p", **options)
    assert "cannot begin (the disk is gone)" in caplog.text
    sink.log({"event": "train", "step": 1, "loss": 2.0})
    sink.close()


def test_without_the_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="pip install trackio"):
        TrackioSink(tmp_path, project="p", space_id=None, config={})
