"""What several processes of a run give each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sltrain.engine.actions import Action, Schedule, every
from sltrain.engine.distributed import Ranks, is_lost_rank
from sltrain.engine.strategy import Replicated


def test_every_rank_begins_with_the_parameters_and_buffers_of_rank_0(on_two_ranks: Callable[..., list[Any]]) -> None:
    def begin(ranks: Ranks) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16())
        model.register_buffer("share", torch.empty(()))
        model.register_buffer("step", torch.empty((), dtype=torch.int64))
        model.register_buffer("positions", torch.empty(5, 3, dtype=torch.int32).to(torch.uint16))
        model.register_buffer("none", torch.empty(0, dtype=torch.int64))
        for tensor in model.state_dict().values():
            tensor.fill_(300 + ranks.rank)
        ranks.send_from_main((*model.parameters(), *model.buffers()))
        return [tensor.float() for tensor in model.state_dict().values()]

    for tensors in on_two_ranks(begin):
        assert all((tensor == 300).all() for tensor in tensors)


def test_after_a_decomposition_every_rank_has_the_model_of_rank_0(on_two_ranks: Callable[..., list[Any]]) -> None:
    def act(ranks: Ranks) -> list[float]:
        model = nn.Linear(3, 4)
        found = []
        for decomposes in (False, True):
            change = Action("change", every(1), lambda moment: model.weight.fill_(ranks.rank), decomposes=decomposes)
            Schedule([change], agree=lambda: Replicated(ranks).agree(model)).run(1)
            found.append(model.weight.mean().item())
        return found

    assert on_two_ranks(act) == [[0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        ("NCCL error in: a.cpp:1, remote process exited\nncclRemoteError: A call failed possibly due to", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("NCCL error in: a.cpp:1, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.", False),
        ("ncclSystemError: System call failed.\nError while creating shared memory segment /dev/shm/nccl-1", False),
    ],
)
def test_an_error_of_the_own_gpu_is_no_lost_rank(said: str, is_lost: bool) -> None:
    assert is_lost_rank(dist.DistBackendError(said)) == is_lost
