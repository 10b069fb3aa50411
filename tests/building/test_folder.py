"""A run folder that only some machines see is found at the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sltrain.building.checks import check_before_text
from sltrain.building.folder import check_shared
from sltrain.compose import TRAIN, compose_config
from sltrain.engine.distributed import Ranks
from sltrain.runs.lock import RunLock


def test_a_run_that_torchrun_starts_again_needs_a_folder_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["model=llama_tiny", "data=stdlib", "max_steps=2", "device=cpu"]
    alone = Ranks(0, 1, torch.device("cpu"))
    check_before_text(compose_config(typed, TRAIN), alone)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # as torchrun tells its processes
    check_before_text(compose_config([*typed, f"run_dir={tmp_path}/run"], TRAIN), alone)
    with pytest.raises(ValueError, match="run_dir=null: after each of up to 3 restarts .*set run_dir=outputs/NAME"):
        check_before_text(compose_config(typed, TRAIN), alone)


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, on_two_ranks: Callable[..., list[Any]]) -> None:
    def check(ranks: Ranks) -> list[str]:
        said = []
        for folder in (tmp_path / "shared", tmp_path / f"disk_of_{ranks.rank}"):
            lock = RunLock(folder) if ranks.is_main else None
            try:
                check_shared(folder, ranks, patience=1.0)
                said.append("")
            except ValueError as error:
                said.append(str(error))
            ranks.gather(None)
            if lock is not None:
                lock.release()
        return said

    for shared, private in on_two_ranks(check):
        assert shared == ""
        assert "disk_of_1 is not the same folder on all machines" in private and "rank 0 (process " in private
