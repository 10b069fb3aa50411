"""TensorBoard's own reader finds the numbers of metrics.jsonl, once each, after a run that was continued too."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from resuming import stopped_at

from sltrain.engine.tensorboard import TensorBoardSink

pytestmark = pytest.mark.slow


def points(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run_dir / "tensorboard"))
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars(key)]


def test_a_continued_run_has_every_point_once(
    tiny: list[str],
    tmp_path: Path,
    sltrain_train: Callable[..., tuple[int, str, str]],
    metrics_of: Callable[[Path], list[dict]],
) -> None:
    run = [*tiny, "tracker=tensorboard", "checkpoint_every=3", "eval_every=2", "keep_last=9"]
    assert sltrain_train(*run, f"run_dir={tmp_path}/straight")[0] == 0
    stopped = stopped_at(tmp_path / "straight", 3, tmp_path / "stopped")  # its tensorboard/ has steps 1 to 6
    assert len(points(stopped, "train/loss")) == 6
    assert sltrain_train(f"run_dir={stopped}")[0] == 0
    assert len(list(stopped.glob("tensorboard/*"))) == 2
    lines = metrics_of(stopped)
    for event, key in (("train", "loss"), ("train", "grad_norm"), ("train", "tokens"), ("eval", "perplexity")):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if line["event"] == event]
        assert points(stopped, f"{event}/{key}") == expected and expected
    assert points(stopped, "final/loss") == [(6, pytest.approx(lines[-1]["loss"], rel=1e-6))]


def test_without_the_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoardSink(tmp_path, 0)
