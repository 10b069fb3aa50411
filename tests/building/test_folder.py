"""A run folder that only some machines see is found at the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sltrain.building.folder import check_shared
from sltrain.engine.distributed import Ranks
from sltrain.runs.lock import RunLock


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
