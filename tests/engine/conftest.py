"""Processes that talk over gloo."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sltrain.engine.distributed import Ranks


@contextmanager
def group_of(store: Path, rank: int, world_size: int = 2) -> Iterator[Ranks]:
    late = timedelta(seconds=60)  # ranks that wait for each other fail, and do not hang
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=late)
    try:
        yield Ranks(rank, world_size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def on_two_ranks(in_child: Callable[[Callable[[], None]], int], tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a function on two gloo ranks, or more, and gives what it returned on each."""

    def run(function: Callable[[Ranks], Any], world_size: int = 2) -> list[Any]:
        def of_rank(rank: int) -> Callable[[], None]:
            def work() -> None:
                with group_of(tmp_path / "store", rank, world_size) as ranks:
                    torch.save(function(ranks), tmp_path / f"{rank}.pt")

            return work

        children = [in_child(of_rank(rank)) for rank in range(world_size)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run
