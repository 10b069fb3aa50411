"""Is the memory of a run what was planned, in the phase that its third update is in?"""

from collections.abc import Callable
from pathlib import Path

import pytest

SIZES = ["model.hidden_size=128", "model.intermediate_size=352", "rank=16", "seq_len=128"]  # few bytes do not show


def is_as_planned(
    overrides: list[str],
    train: Callable[..., tuple[int, str, str]],
    lines_of: Callable[[Path], list[dict]],
    folder: Path,
) -> None:
    """Train four updates; the peak of the third, the one that is measured, is within 5 % of the plan."""
    code, _, err = train(*overrides, *SIZES, "max_steps=4", f"run_dir={folder}")
    assert code == 0, err
    last = [line for line in lines_of(folder) if "peak_tensor_bytes" in line][-1]
    assert last["peak_tensor_bytes"] == pytest.approx(last["planned_memory_bytes"], rel=0.05)
