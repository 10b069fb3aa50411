"""One optimizer step whose updates happen inside backward: the sibling of step.py for per-layer updates.

The loss of an update is the same: the sum of the token losses of all ranks and micro-batches over the number of their
targets. The model is not wrapped in DDP. Gradients are summed over ranks inside backward, so there is no factor
world_size here.

By the time all gradients are known the first have been used, so what is bad must be found earlier. The loss is read
before backward, and a gradient before it is used; a bad one skips its own tensor.

hold   the loss of all micro-batches and ranks is read before the last backward, the only one that updates anything. If
       it is not finite the whole update is skipped, as in step.py.
fold   every backward changes the moments, so each micro-batch's loss is read before its own, on its rank alone; a bad
       micro-batch is left out. It still counts in the number of targets: the others weigh what they would have weighed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sltrain.engine.distributed import Ranks
from sltrain.engine.step import StepResult


class PerLayerOptimizer(Protocol):
    """What this step needs of an optimizer that updates inside backward."""

    folds: bool  # whether each micro-batch's gradients are used in its own backward, or all in the last one's

    has_begun: bool  # whether the update under way has changed weights or moments

    def zero_grad(self) -> None:
        """Drop gradients and an update that was begun."""

    def before_backward(self, is_last: bool) -> None:
        """Announce the backward of one micro-batch, the update's last one or not."""

    def finish(self) -> tuple[float, int, int]:
        """End the update, on all ranks: sum of squared norms of the gradients used, number of tensors updated, number
        of gradients left out because they were not finite."""
        ...


def train_step_per_layer(
    model: nn.Module,
    optimizer: PerLayerOptimizer,
    micro_batches: Sequence[tuple[Tensor | None, ...]],
    num_targets: int,
    ranks: Ranks,
    on_skip: Callable[[str], None] = lambda name: None,
) -> StepResult:
    """Run one update.

    Args:
        model: maps what a micro-batch holds to its summed token loss, a scalar; bare, not in DDP.
        micro_batches: those of this rank, as micro_batch.py makes them, on the model's device.
        num_targets: predicted tokens of the whole update, over all ranks.
        on_skip: called with the name of what was not finite when the whole update is skipped.

    Returns:
        StepResult, whose grad_norm is with hold the norm of all gradients that were finite, before clipping; with fold
        the root of the summed squared norms of each micro-batch's gradients on each rank, 1 / sqrt(their number) of it
        if they agree.
    """
    optimizer.zero_grad()
    num_targets = max(num_targets, 1)
    loss_sum = torch.zeros((), dtype=torch.float32, device=ranks.device)
    num_bad = 0  # micro-batches
    for i, micro_batch in enumerate(micro_batches):
        is_last = i + 1 == len(micro_batches)
        loss = model(*micro_batch)
        loss_sum += loss.detach()
        if optimizer.folds:
            if not math.isfinite(loss.item()):
                num_bad += 1
                del loss  # and all that its graph keeps
                continue
        elif is_last and not math.isfinite(ranks.sum_(loss_sum).item()):  # from here on the sum of all ranks
            optimizer.zero_grad()
            on_skip("loss")
            return StepResult(loss_sum.item() / num_targets, math.nan, skipped=True)
        optimizer.before_backward(is_last)
        (loss * (1 / num_targets)).backward()

    squared_norm, num_updated, num_skipped = optimizer.finish()
    totals = torch.stack([loss_sum, torch.full_like(loss_sum, num_bad)])
    loss_total, num_bad_total = (ranks.sum_(totals) if optimizer.folds else totals).tolist()
    result = StepResult(loss_total / num_targets, math.sqrt(squared_norm))
    result.num_skipped_tensors, result.num_skipped_micro_batches = num_skipped, int(num_bad_total)
    if num_updated == 0:
        result.skipped = True
        on_skip("every gradient" if math.isfinite(result.loss) else "loss")
    return result
