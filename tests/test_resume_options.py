"""Options that add to what a run computes or remembers: a run that was cut at a checkpoint ends as the straight one, in
every bit of its last checkpoint and of its log."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, str, str]]
Metrics = Callable[[Path], list[dict]]
CLOCKS = ("wall_seconds", "tokens_per_second", "tflops", "data_wait_fraction", "path")
CLOCKS += ("blocked_seconds", "save_seconds")


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step_*"))[-1]


def without_clocks(lines: list[dict]) -> list[dict]:
    return [
        {key: line[key] for key in line if key not in CLOCKS and "memory" not in key and "peak" not in key}
        for line in lines
    ]


@pytest.mark.parametrize(
    "how",
    [
        "precision=mixed z_loss=0.01",
        "ema=0.7",
        "dtype=bfloat16 ema=0.7 per_layer_update=true",
        "dtype=bfloat16 moments_dtype=float32",
        "optimizer=galore optimizer.moments_dtype=8bit optimizer.rank=2 optimizer.update_every=2 method=full",
        "model.tie_word_embeddings=true model.rope_scaling.rope_type=llama3 per_layer_update=true",
    ],
)
def test_a_run_that_was_cut_ends_as_the_straight_one(
    how: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, metrics_of: Metrics
) -> None:
    recipe = [*tiny, *how.split(), "checkpoint_every=3", "eval_every=2"]
    straight, again = tmp_path / "straight", tmp_path / "again"
    code, _, err = sltrain_train(*recipe, f"run_dir={straight}")
    assert code == 0, err
    shutil.copytree(straight, again, symlinks=True)
    shutil.rmtree(newest(again))
    (again / "summary.json").unlink()
    code, out, err = sltrain_train(*recipe, f"run_dir={again}")
    assert code == 0 and "from step 3" in out, err
    files = {
        path.name: path.read_bytes() for path in newest(straight).iterdir() if path.name[:5] not in ("state", "manif")
    }
    assert len(files) >= 2
    for name, content in files.items():
        assert (newest(again) / name).read_bytes() == content, name
    assert without_clocks(metrics_of(again)) == without_clocks(metrics_of(straight))
