"""The processes of one run: who am I, how many are we, and the few collective operations a run needs.

torchrun describes the processes in environment variables, which a run reads here and nowhere else. Without them it is
one process and every operation here is the identity. Numbers and Python objects travel over gloo on the host,
gradients over NCCL (CUDA) or gloo (CPU).
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device of this process for `auto`, `cpu` or `cuda`; with CUDA, the GPU of its local rank. Raises
    ValueError if there is none."""
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ValueError("device=cuda, but this machine shows no CUDA GPU to PyTorch; use device=cpu or device=auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: {count} visible; start at most {count} processes a node"
        )
    return torch.device("cuda", local_rank)


class ToldByAnotherRank(ValueError):
    """Another rank failed and reports why; this rank ends with it, silently."""

    told_by_another_rank = True


@dataclass
class Ranks:
    """The processes of one run as this process sees them."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: torch.device) -> "Ranks":
        """Join the processes that torchrun started, or be the only one."""
        ranks = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if ranks.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        return ranks

    def stop(self) -> None:
        """Leave the group; safe to call twice."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def num_on_this_machine(self) -> int:
        """How many of the processes share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sum over all ranks of a few integers (token counts, flags)."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, on its own device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; its ValueError or OSError is raised on every rank."""
        if self.world_size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
                dist.broadcast_object_list(answer, src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise ToldByAnotherRank(answer[1])
        return answer[0]

    def everywhere(self, make: Callable[[], T]) -> T:
        """`make()` on every rank. If it raises ValueError or OSError on some rank, all ranks fail, and the first such
        rank reports it. `make` must not communicate."""
        result, error = None, None
        try:
            result = make()
        except (ValueError, OSError) as raised:
            if self.world_size == 1:
                raise
            error = raised
        messages = self.gather(None if error is None else str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed and failed[0] == self.rank and error is not None:
            raise error
        if failed:
            raise ToldByAnotherRank(messages[failed[0]])
        return result  # type: ignore[return-value]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over ranks during backward. Buffers are never sent: supports are
        equal by construction."""
        if self.world_size == 1:
            return model
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def bucket_bytes(self, model: nn.Module) -> int:
        """What DDP holds all the time for the gradients of a model that `wrap` returned."""
        if not isinstance(model, DistributedDataParallel):
            return 0
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backward inside this context adds to the local gradients without averaging them over ranks."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
