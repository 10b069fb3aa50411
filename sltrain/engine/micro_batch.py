"""The data of one update: fetched, agreed on by all ranks, cut into micro-batches. A micro-batch is what a forward pass
reads: ids, labels, and which positions to compute.

A document shorter than its row ends in pads, which a model can skip. The last real token of a row predicts nothing and
nothing after it reads it, so it is skipped too. What remains are the positions before the last label of their row, all
of which have a target. They are counted here, from labels on the host: counting on a GPU would make the host wait.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sltrain.engine.distributed import Ranks
from sltrain.engine.stop import StopRequest
from sltrain.numeric import IGNORED_LABEL

# input_ids (B, T), labels (B, T), rows (N,) or None for all; with attention=document also positions (B, T)
MicroBatch = tuple[Tensor | None, ...]

STOP_CHECK_SECONDS = 1.0  # how long a signal may wait for a stream that waits for the network


@dataclass
class Update:
    """The data of one update."""

    batch: Any  # this rank's rows; None if it has none
    num_tokens: int  # this and the following: of all ranks
    num_targets: int
    someone_stopped: bool
    someone_lost_data: bool
    someone_failed_to_save: bool = False  # in the background


@dataclass
class Feed:
    """Fetches the batches of this rank. The stream prefetches, so each batch carries the position that follows it."""

    stream: Any  # iterator of batches, with `wait` and `close`
    ranks: Ranks
    stop: StopRequest
    micro_batch_size: int
    state: dict[str, Any] = field(default_factory=dict)  # the stream's position after the last finished update
    error: Exception | None = None  # what ended this rank's stream

    def fetch(self) -> Any:
        """This rank's next batch; None if a signal came first, or if the stream ended with `error`."""
        try:
            while not self.stop.is_set:
                if self.stream.wait(STOP_CHECK_SECONDS):
                    return next(self.stream)
        except (ConnectionError, ValueError) as error:  # the network is lost, or on_bad_data=stop
            self.error = error
        return None

    def agree(self, batch: Any, failed_to_save: bool = False) -> Update:
        """The update of which this rank fetched `batch`; except for the rows it is the same on all ranks."""
        counts = [0, 0] if batch is None else [batch.num_tokens, batch.num_targets]
        flags = [self.stop.is_set, self.error is not None, failed_to_save]
        num_tokens, num_targets, *numbers = self.ranks.sum([*counts, *map(int, flags)])
        return Update(batch, num_tokens, num_targets, *(number > 0 for number in numbers))

    def micro_batches(self, batch: Any) -> list[MicroBatch]:
        """This rank's rows, in order, `micro_batch_size` at a time, on its device."""
        return split_rows(batch, self.micro_batch_size, self.ranks.device)


def split_rows(batch: Any, size: int, device: torch.device) -> list[MicroBatch]:
    """The rows of anything with input_ids, labels and positions, `size` at a time, in order, on `device`."""
    tensors = [batch.input_ids, batch.labels, *([] if batch.positions is None else [batch.positions])]
    pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return [make_micro_batch(ids, labels, device, *positions) for ids, labels, *positions in pieces]


def make_micro_batch(
    input_ids: Tensor, labels: Tensor, device: torch.device, positions: Tensor | None = None
) -> MicroBatch:
    """The micro-batch of these host tensors, (B, T) int64 each, on `device`, without waiting for the copies."""
    tensors = (input_ids, labels, rows_to_compute(labels), *([] if positions is None else [positions]))
    return tuple(None if tensor is None else _send(tensor, device) for tensor in tensors)


def rows_to_compute(labels: Tensor) -> Tensor | None:
    """The positions b T + t of labels (B, T) that the loss depends on, (N,) int64, ascending; None if no row is
    padded."""
    positions = torch.arange(labels.shape[1])
    last = (positions * (labels != IGNORED_LABEL)).amax(1, keepdim=True)  # (B, 1) of the last label in each row
    if bool((last == labels.shape[1] - 1).all()):
        return None
    return (positions < last).flatten().nonzero().squeeze(1)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy through pinned memory, so that the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
