"""A folder holds one run, continued only with the same mathematics."""

from pathlib import Path

import pytest

from sltrain.config import RETIRED_KEYS
from sltrain.runs.run_folder import RunFolder

CONFIG = {
    "model": {"name": "tiny"},
    "method": {"name": "sltrain"},
    "sparsity": 0.03,
    "rank": 8,
    "lr": 1e-3,
    "path": ["a", "b"],
    "optimizer": {"name": "adamw", "betas": [0.9, 0.999]},
    "rank_overrides": {},
}


def claimed(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.check(CONFIG, "auto", ["path"])
    folder.claim(CONFIG, "auto", ["path"], "{}")
    return folder


def trained(path: Path) -> None:
    """A run with a checkpoint, whose process has ended."""
    claimed(path).release()
    (path / "checkpoints" / "step_00000001").mkdir(parents=True)


def test_same_configuration_continues(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    claimed(tmp_path / "run").release()


def test_changes_are_refused_by_name_once_there_is_training_to_lose(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claimed(tmp_path / "run").release()
    folder.check({**CONFIG, "rank": 4}, "auto", ["path"])
    trained(tmp_path / "run")
    folder.check({**CONFIG, "path": "elsewhere"}, "auto", ["path"])
    with pytest.raises(ValueError, match=r"rank was 8, is now 4"):
        folder.check({**CONFIG, "rank": 4}, "auto", ["path"])
    with pytest.raises(ValueError, match=r"optimizer\.betas was \[0\.9, 0\.999\]"):
        folder.check({**CONFIG, "optimizer": {"name": "adamw", "betas": [0.9, 0.95]}}, "auto", [])
    with pytest.raises(ValueError, match=r"rank_overrides\.q_proj was None, is now 4"):
        folder.check({**CONFIG, "rank_overrides": {"q_proj": 4}}, "auto", [])
    with pytest.raises(ValueError, match="resume=auto continues it"):
        folder.check(CONFIG, "never", [])


def test_a_retired_key_is_no_change_unless_it_meant_something_else(tmp_path: Path) -> None:
    """An earlier version wrote it into every config.yaml."""
    trained(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for key, todays in RETIRED_KEYS.items():
        folder.write_config({**CONFIG, key: todays})
        folder.check(CONFIG, "auto", ["path"])
        folder.write_config({**CONFIG, key: "otherwise"})
        with pytest.raises(
            ValueError, match=rf"holds a run with {key}=otherwise, .* \(only {key}={todays}\)"
        ) as caught:
            folder.check(CONFIG, "auto", ["path"])
        assert "\n" not in str(caught.value)


def test_a_key_that_a_run_began_without_is_no_change(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    RunFolder(tmp_path / "run").check({**CONFIG, "support": "uniform"}, "auto", ["path"])


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match="tokenizer"):
        RunFolder(tmp_path / "run").claim(CONFIG, "auto", [], '{"other": 1}')


def test_live_folder_is_refused(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "run")
    with pytest.raises(ValueError, match="in use"):
        claimed(tmp_path / "run")
    folder.release()


def test_run_that_another_process_finished_meanwhile_is_left_alone(tmp_path: Path) -> None:
    claimed(tmp_path / "run").release()
    folder = RunFolder(tmp_path / "run")
    folder.check(CONFIG, "auto", [])
    folder.finish({"loss": float("inf")})
    assert folder.summary_file.read_text() == '{"loss": null}\n'
    with pytest.raises(ValueError, match="finished by another process"):
        folder.claim(CONFIG, "auto", [], "{}")


def test_new_folders_never_collide(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / "outputs" / "now", is_new=True) for _ in range(3)]
    assert [folder.claim(CONFIG, "auto", [], "{}").name for folder in folders] == ["now", "now_2", "now_3"]


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "metrics.jsonl", "notes.tmp"])
def test_files_of_others_are_never_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("my: precious")
    with pytest.raises(ValueError, match="holds other files"):
        RunFolder(tmp_path).check(CONFIG, "auto", [])


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_thrown_away(tmp_path: Path) -> None:
    claimed(tmp_path / "run").release()
    folder = RunFolder(tmp_path / "run")
    (folder.path / "checkpoints" / "step_00000002.tmp").mkdir(parents=True)
    folder.check({**CONFIG, "rank": 4}, "auto", [])
    folder.metrics_file.write_text('{"event": "train", "step": 1}\n')
    with pytest.raises(ValueError, match="rank was 8"):
        folder.check({**CONFIG, "rank": 4}, "auto", [])
    with pytest.raises(ValueError, match="resume=auto continues it"):
        folder.check(CONFIG, "never", [])
    folder.check(CONFIG, "auto", [])


def test_what_happens_between_check_and_claim_counts(tmp_path: Path) -> None:
    late = RunFolder(tmp_path / "run")
    late.check(CONFIG, "never", [])
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run"):
        late.claim(CONFIG, "never", [], "{}")
