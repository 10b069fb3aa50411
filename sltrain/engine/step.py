"""One optimizer step: micro-batches -> gradients -> update.

The loss of an update is the mean over all its tokens, whatever micro-batch or rank they are in:

    loss = (sum over ranks and micro-batches of the token losses) / (number of their predicted tokens)

so every micro-batch's summed loss is divided by the global token count, which is known before the first backward. DDP
averages over ranks, hence the factor world_size. An update whose loss or gradient is not finite is skipped; the one
host read of a step serves that test and the log.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sltrain.engine.distributed import Ranks

NORM_PIECE = 2**22  # elements


@dataclass
class StepResult:
    """What one update did."""

    loss: float  # mean token loss of the update, natural log, over all ranks
    grad_norm: float  # global L2 norm, before clipping
    skipped: bool = False  # nothing was updated: loss or gradient was not finite
    # Of per_layer_step.py, over all ranks: what was left out because it was not finite, while the rest was used.
    num_skipped_tensors: int = 0  # gradients
    num_skipped_micro_batches: int = 0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[tuple[Tensor | None, ...]],
    num_targets: int,
    ranks: Ranks,
    grad_clip: float | None = None,
    on_skip: Callable[[str], None] = lambda name: None,
    grad_clip_per_parameter: float | None = None,
) -> StepResult:
    """Run one update.

    Args:
        model: maps what a micro-batch holds to its summed token loss, a scalar.
        micro_batches: those of this rank, as micro_batch.py makes them, on the model's device.
        num_targets: predicted tokens of the whole update, over all ranks.
        grad_clip: largest global gradient norm, or None.
        on_skip: called with the name of what was not finite when the update is skipped.
        grad_clip_per_parameter: largest norm of one parameter's gradient, or None; a larger one is scaled down.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float32, device=ranks.device)
    scale = ranks.world_size / max(num_targets, 1)
    for i, micro_batch in enumerate(micro_batches):
        is_last = i + 1 == len(micro_batches)
        with nullcontext() if is_last else ranks.no_sync(model):  # gradients cross ranks once an update
            loss = model(*micro_batch)
            (loss * scale).backward()
        loss_sum += loss.detach()

    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # In float32: the norm of bfloat16 gradients would itself be rounded to three digits.
    exact = torch.promote_types(loss.dtype, parameters[0].dtype)
    if ranks.device.type == "cuda" or gradients[0].dtype == exact:
        norms = torch._foreach_norm(gradients, dtype=exact)  # one launch for many
    else:
        norms = tuple(_norm(gradient, exact) for gradient in gradients)
    norm = torch.linalg.vector_norm(torch.stack(norms)).float()
    loss_value, norm_value = torch.stack([ranks.sum_(loss_sum), norm]).tolist()
    result = StepResult(loss_value / max(num_targets, 1), norm_value)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        result.skipped = True
        on_skip(_first_non_finite(model))
        return result
    if grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if grad_clip_per_parameter is not None:
        coefficients = [(grad_clip_per_parameter / (norm + 1e-6)).clamp_(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, coefficients)
    optimizer.step()
    return result


def _norm(gradient: Tensor, exact: torch.dtype) -> Tensor:
    """In pieces, because a CPU makes a copy in `exact` of what it takes the norm of."""
    pieces = [torch.linalg.vector_norm(piece, dtype=exact) for piece in gradient.reshape(-1).split(NORM_PIECE)]
    return torch.linalg.vector_norm(torch.stack(pieces))


def _first_non_finite(model: nn.Module) -> str:
    """Name of the first parameter whose gradient is not finite, or `loss`."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"gradient of {name.removeprefix('module.')}"
    return "loss"
