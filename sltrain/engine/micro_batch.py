"""What one forward pass reads: ids, labels, and which positions to compute.

A document shorter than its row ends in pads, on which a model need not spend anything. Of the real tokens the last one
of a row predicts nothing and is read by nothing after it, so it is left out too: what remains are the positions before
the last label of their row, all of which have a target.

They are counted here, from labels on the host: a GPU that counted them would make the host wait for it.
"""

import torch
from torch import Tensor

from sltrain.numeric import IGNORED_LABEL

MicroBatch = tuple[Tensor, Tensor, Tensor | None]  # input_ids (B, T), labels (B, T), rows (N,) or None for all


def make_micro_batch(input_ids: Tensor, labels: Tensor, device: torch.device) -> MicroBatch:
    """The micro-batch of these host tensors, (B, T) int64 each, on `device`, without waiting for the copies."""
    rows = rows_to_compute(labels)
    return _send(input_ids, device), _send(labels, device), None if rows is None else _send(rows, device)


def rows_to_compute(labels: Tensor) -> Tensor | None:
    """The positions b T + t of labels (B, T) that a loss depends on, (N,) int64, ascending; None if no row is
    padded."""
    positions = torch.arange(labels.shape[1])
    last = (positions * (labels != IGNORED_LABEL)).amax(1, keepdim=True)  # (B, 1) of the last label in each row
    if bool((last == labels.shape[1] - 1).all()):
        return None
    return (positions < last).flatten().nonzero().squeeze(1)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy from pinned memory does not make the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
