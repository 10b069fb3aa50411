"""The processes of one run: this one's rank, the world size, and the few collective operations a run needs.

torchrun describes the processes in environment variables. Without them there is one process and every collective is
the identity. Numbers and Python objects travel over gloo on the host, gradients over NCCL (CUDA) or gloo (CPU). How the
processes share a model is strategy.py's.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sltrain.engine.interface import name_interface
from sltrain.engine.watch import BESIDE, Watch, connect_to_store
from sltrain.log import first_line
from sltrain.numeric import is_stand_in

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device of this process for `auto`, `cpu` or `cuda` (the GPU of its local rank). Raises ValueError if there is
    none."""
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ValueError("device=cuda, but this machine shows no CUDA GPU to PyTorch; use device=cpu or device=auto")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: {count} visible; start at most {count} processes a node"
        )
    return torch.device("cuda", local_rank)


class ToldByAnotherRank(ValueError):
    """Another rank failed and reports why; this rank ends silently."""

    told_by_another_rank = True


# What NCCL says of this process and its GPU; a peer that is gone is an ncclRemoteError or a time-out.
OWN_NCCL_ERRORS = (
    "ncclUnhandledCudaError",
    "ncclInternalError",
    "ncclInvalidArgument",
    "ncclInvalidUsage",
    "shared memory segment",  # an ncclSystemError: /dev/shm is too small
)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an operation failed because another process of the run is gone."""
    if isinstance(error, dist.DistBackendError):
        return not any(own in str(error) for own in OWN_NCCL_ERRORS)
    if isinstance(error, dist.DistNetworkError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def why_lost(error: BaseException) -> str:
    """What such an error says, without the place in gloo's code and its advice."""
    return re.sub(r"\[/[^]]*\] ", "", first_line(error)).partition(". This is")[0]


@dataclass
class Ranks:
    """The processes of one run as this process sees them."""

    rank: int
    world_size: int
    device: torch.device
    watch: Watch | None = None  # ends the run when another rank hangs
    group: dist.ProcessGroup | None = None  # over which they talk; None: the one that all of a run begin with

    @classmethod
    def start(cls, device: torch.device, hang_timeout: float = 0.0) -> "Ranks":
        """Join the processes that torchrun started; without torchrun, the only one. `hang_timeout`: seconds after which
        a rank that hangs ends the run, see watch.py; 0: a collective that takes half an hour raises RuntimeError."""
        ranks = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if ranks.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            name_interface()
            if hang_timeout:
                connect = partial(connect_to_store, timeout=max(hang_timeout / 2, 5.0))
                ranks.watch = Watch(ranks.rank, ranks.world_size, hang_timeout, connect)
                ranks.watch.start()
            try:
                ranks._join(backend, ranks._timeout)
            except BaseException:
                ranks.stop()
                raise
        return ranks

    def _join(self, backend: str, timeout: timedelta) -> None:
        """Meet the others. torchrun keeps one store for all its restarts: without a prefix of their own processes would
        find the addresses of those before them."""
        store, rank, world_size = next(rendezvous("env://", self.rank, self.world_size, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)

    @property
    def _timeout(self) -> timedelta:
        """Watched, a rank may wait for another that works: for hours while it trains a tokenizer, for instance."""
        return timedelta(minutes=30) if self.watch is None else timedelta(days=1)

    def beside(self) -> "Ranks":
        """The same processes on a group of their own, for a thread: collectives of one group come in one order. All
        ranks call it together."""
        group = dist.new_group(backend="gloo", timeout=self._timeout, group_desc=BESIDE)
        return replace(self, group=group)

    def stop(self) -> None:
        """Leave the group; safe to call twice."""
        if self.watch is not None:
            self.watch.stop()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def at(self, what: str, patience: float = 0.0) -> None:
        """Tell the other ranks what begins here, and how many seconds it may take beyond hang_timeout."""
        if self.watch is not None:
            self.watch.at(what, patience)

    def tick(self) -> None:
        """Tell them that it goes on."""
        if self.watch is not None:
            self.watch.tick()

    @property
    def num_on_this_machine(self) -> int:
        """How many of the processes share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sum of a few integers (token counts, flags) over all ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, on its own device."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def send_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank these tensors of rank 0: a decomposition, and what is chosen by one, may differ between
        machines."""
        if self.world_size > 1:
            for tensor in tensors:
                if is_stand_in(tensor):  # what it stands for are buffers
                    continue
                values = tensor.detach()  # integers byte by byte: not every backend sends uint16
                sent = values if values.is_floating_point() else values.view(-1).view(torch.uint8)
                dist.broadcast(sent, src=0, group=self.group)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def refuse(self, reason: str) -> NoReturn:
        """Raise ValueError on all ranks, which all call this; rank 0 reports it."""
        raise ValueError(reason) if self.is_main else ToldByAnotherRank(reason)

    def on_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; its ValueError or OSError is raised on every rank."""
        answer: list[Any] = [self.everywhere(lambda: make() if self.is_main else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(answer, src=0, group=self.group)
        return answer[0]

    def everywhere(self, make: Callable[[], T]) -> T:
        """`make()` on every rank. If it raises ValueError or OSError on some rank, all ranks fail and the first failing
        one reports it. `make` must not communicate."""
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
