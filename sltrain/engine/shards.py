"""Which rows of a tensor each of several processes holds, and how they make the whole one again.

A tensor of R rows on n processes is cut as torch.chunk and fully_shard cut it: ceil(R / n) rows each, so the last
processes may have fewer, or none.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """What this process holds of one parameter."""

    parameter: nn.Parameter  # the model's, a DTensor if it is cut
    local: nn.Parameter  # its rows here, which share the memory
    is_cut: bool  # otherwise it is held whole: it has no elements


def rows_of(num_rows: int, position: int, num_parts: int) -> slice:
    """The rows of the process at `position`, from 0."""
    each = -(-num_rows // num_parts)
    return slice(min(position * each, num_rows), min((position + 1) * each, num_rows))


def gather_rows(part: Tensor, num_rows: int, group: dist.ProcessGroup, to: int | None = None) -> Tensor | None:
    """The whole tensor of `num_rows` rows, from the part of each process of `group`, in order. All of them call it;
    with `to` only the one at that position gets it, and the others None."""
    num_parts, position = dist.get_world_size(group), dist.get_rank(group)
    each = -(-num_rows // num_parts)
    padded = part.detach().contiguous()
    if len(part) < each:
        padded = padded.new_zeros(each, *part.shape[1:])
        padded[: len(part)] = part
    sent = padded.view(-1).view(torch.uint8)  # byte by byte: not every backend sends every dtype
    if to is None:
        received = sent.new_empty(num_parts, sent.numel())
        dist.all_gather(list(received.unbind()), sent, group=group)
    else:
        received = sent.new_empty(num_parts if position == to else 0, sent.numel())
        dist.gather(sent, list(received.unbind()) if position == to else None, group=group, group_dst=to)
        if position != to:
            return None
    return received.view(-1).view(part.dtype).view(num_parts * each, *part.shape[1:])[:num_rows]


def scatter_rows(whole: Tensor | None, part: Tensor, num_rows: int, group: dist.ProcessGroup, source: int) -> None:
    """The inverse: fill `part`, this process's rows, from the whole tensor, which the process at `source` has."""
    num_parts, each = dist.get_world_size(group), -(-num_rows // dist.get_world_size(group))
    received = part.new_empty(each, *part.shape[1:])
    sent = None
    if whole is not None:
        padded = whole.new_zeros(num_parts * each, *part.shape[1:])
        padded[:num_rows] = whole
        sent = list(padded.view(num_parts, -1).view(torch.uint8).unbind())
    dist.scatter(received.view(-1).view(torch.uint8), sent, group=group, group_src=source)
    part.copy_(received[: len(part)])
