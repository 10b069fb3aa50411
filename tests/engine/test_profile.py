"""The trace holds the updates that were asked for, and recording them changes nothing."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resuming import stopped_at
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]


def test_a_run_that_stops_within_the_window_has_a_trace_of_each_part(
    tiny: list[str], tmp_path: Path, sltrain_train: Run
) -> None:
    run = [*tiny, "checkpoint_every=3", "keep_last=9", "tokenizer=bpe:300"]
    assert sltrain_train(*run, f"run_dir={tmp_path}/straight")[0] == 0
    stopped = stopped_at(tmp_path / "straight", 3, tmp_path / "stopped")
    code, out, err = sltrain_train(f"run_dir={stopped}", "profile_steps=[2,5]")
    assert code == 0 and "Profiler" not in err and "WARNING" not in err, "torch's own lines"
    trace = stopped / "trace_4-5.json.gz"
    assert [line.split()[1] for line in out.splitlines() if line.startswith("profile")] == [f"{trace}:"]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = {event["name"]: event for event in events if str(event.get("name")).startswith("update ")}
    assert sorted(spans) == ["update 4", "update 5"]
    for span in spans.values():
        inside = [event["name"] for event in events if 0 <= event.get("ts", -1) - span["ts"] <= span["dur"]]
        assert inside.count("aten::mm") >= 2 and any(name.startswith("Optimizer.step") for name in inside), (
            "forward, backward and optimizer"
        )
    ends = [
        load_file(tmp_path / name / "checkpoints/step_00000006/model.safetensors") for name in ("straight", stopped)
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    code, out, _ = sltrain_train(f"run_dir={stopped}", "extend=0")
    assert code == 0 and sorted(stopped.glob("trace_*")) == [trace]


@pytest.mark.parametrize("steps", ["[4,2]", "[0,2]", "[2,7]", "[3]", "[1,2,3]", "[]"])
def test_a_window_outside_the_run_is_refused_before_anything_is_built(
    steps: str, tiny: list[str], tmp_path: Path, sltrain_train: Run
) -> None:
    code, _, err = sltrain_train(*tiny, f"run_dir={tmp_path}/run", f"profile_steps={steps}")
    assert code == 2 and err.count("\n") == 1
    assert f"profile_steps={steps}: give the first and the last update" in err and "1 to the 6" in err
    assert not (tmp_path / "run").exists()
