"""How weights are divided over processes, and how large a share is.

PyTorch's fully_shard (FSDP2) cuts each parameter along its first dimension into equal shards, the last ones shorter or
empty, and gives every rank room for a whole one:

    shard of a parameter (d_0, d_1, ...)   ceil(d_0 / n) d_1 ...      n: ranks that hold one copy of the weights
    gathered parameter                     n ceil(d_0 / n) d_1 ...    padded

Buffers, the positions of S among them, are whole on every rank. With replicas (HSDP) there are several copies of the
weights, each on its own n ranks. Source: torch.distributed.fsdp.fully_shard of torch 2.11 to 2.15, its FSDPParam; the
idea is ZeRO's third stage (Rajbhandari et al., arXiv 1910.02054, section 5).
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from sltrain.parameters import ParamInfo


@dataclass(frozen=True)
class Sharding:
    """How one run's weights lie on its processes.

    Args:
        num_shards: ranks that hold one copy of the weights between them.
        replicas: copies of the weights; `num_shards` times this is the number of processes.
        gathered_element: bytes of an element of gathered weights and of their gradients; None: as they are stored.
        reduced_element: bytes of an element of gradients while they are summed; None: as the gradients.
        reduces_each: whether every micro-batch is summed over ranks. If only the last one is, the gradients of those
            before are whole on every rank.
        reshards: whether a layer's gathered weights are dropped after forward, and gathered again in backward.
    """

    num_shards: int
    replicas: int = 1
    gathered_element: int | None = None
    reduced_element: int | None = None
    reduces_each: bool = True
    reshards: bool = True

    def gathered_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of these parameters gathered, padding included."""
        sizes = ((p, self.gathered_element or p.element_size()) for p in parameters)
        return sum(padded_numel(p.shape, self.num_shards) * size for p, size in sizes)

    def whole_gradient_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the gradients that backward gives for these parameters, before they are summed."""
        return sum(p.numel() * (self.gathered_element or p.element_size()) for p in parameters if p.requires_grad)

    def waiting_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of whole gradients that wait for the last micro-batch."""
        trained = [p for p in parameters if p.requires_grad]
        return sum(p.numel() * (self.reduced_element or self.gathered_element or p.element_size()) for p in trained)

    def reduced_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the buffer in which the gradients of these parameters are summed, padding included."""
        return sum(self.reduced_shard_bytes([p]) * self.num_shards for p in parameters)

    def reduced_shard_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of a rank's share of that buffer."""
        trained = [p for p in parameters if p.requires_grad]
        sizes = ((p, self.reduced_element or self.gathered_element or p.element_size()) for p in trained)
        return sum(math.prod(local_shape(p.shape, self.num_shards)) * size for p, size in sizes)

    def gradient_shard_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of a rank's share of the gradients of these parameters, as the optimizer gets them."""
        trained = [p for p in parameters if p.requires_grad]
        return sum(math.prod(local_shape(p.shape, self.num_shards)) * p.element_size() for p in trained)

    def rounded_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of a rank's share of sums that are in another dtype than the optimizer gets: both exist at a time."""
        sizes = ((p, self.reduced_element or self.gathered_element or p.element_size()) for p in parameters)
        return self.reduced_shard_bytes([p for p, size in sizes if size != p.element_size()])


def local_shape(shape: Sequence[int], num_shards: int) -> tuple[int, ...]:
    """The shape of the first rank's shard, which is the largest. A number without dimensions is whole on all ranks."""
    return (-(-shape[0] // num_shards), *shape[1:]) if shape else ()


def padded_numel(shape: Sequence[int], num_shards: int) -> int:
    """Elements of a parameter of this shape with all shards as large as the first."""
    return num_shards * math.prod(local_shape(shape, num_shards))


def local_infos(infos: Iterable[ParamInfo], num_shards: int) -> list[ParamInfo]:
    """What an optimizer on the first rank sees of these parameters."""
    return [dataclasses.replace(info, shape=local_shape(info.shape, num_shards)) for info in infos]
