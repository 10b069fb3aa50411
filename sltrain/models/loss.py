"""Sum of token cross-entropies without ever holding the logits of all rows.

    N rows, D hidden size, V vocabulary       loss = sum_n  logsumexp(h_n W^T) - h_n W_{y_n}^T
    dlogits = softmax(h W^T) - onehot(y),     dh = dlogits W,     dW = dlogits^T h

The logits of one 512 x 256 batch over 32,000 tokens are 16.8 GB in float32, as much again for their gradient: far
more than the rest of a small model. So a chunk of rows at a time makes its logits, its loss and at once, in the forward
pass, its gradients; backward only multiplies them by the gradient of the sum. Beside a chunk of logits this holds dh
(N, D) and dW (V, D), accumulated in float32 so that many small bfloat16 contributions are not rounded away. The
logits are a product in the weights' dtype; softmax and loss are float32 (float64 for float64 input).

torch has a `linear_cross_entropy` of the same idea, but not in every release this package supports (torch >= 2.11), and
with options that still move; thirty lines of our own behave the same everywhere. As there, the result can be
differentiated once, not twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # label of a position without a target, as in torch and transformers
CHUNK_BYTES = 64 * 2**20  # of float32 logits
MIN_CHUNK_ROWS = 128  # fewer rows would leave the matrix products idle


def default_chunk_rows(vocab_size: int) -> int:
    """Rows whose float32 logits fill CHUNK_BYTES."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size))


@torch.compiler.disable  # tracing would unroll the loop over chunks, anew for every number of rows
def chunked_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Sum over rows of cross-entropy(hidden weight^T, labels), 0-d float32, in nats.

    hidden (N, D), weight (V, D), labels (N,) int64 where -100 marks rows without a target. `chunk_rows` bounds the rows
    of logits held at a time (None: by CHUNK_BYTES). Without gradients to compute (torch.no_grad) only the loss is.
    """
    device_type = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device_type)
    if has_autocast and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk_rows = chunk_rows or default_chunk_rows(weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropySum.apply(hidden, weight, labels, chunk_rows)
    return _run_chunks(hidden, weight, labels, chunk_rows, False, False)[0]


class _ChunkedCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss, *gradients = _run_chunks(hidden, weight, labels, chunk_rows, needs_hidden, needs_weight)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In grad_loss's float32: 1 / num_tokens rounded to bfloat16 would shift every gradient's scale by up to 0.4 %.
        scaled = (
            None if grad is None else (grad.to(grad_loss.dtype) * grad_loss).to(grad.dtype)
            for grad in ctx.saved_tensors
        )
        return *scaled, None, None


@torch.no_grad()
def _run_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss sum, d loss / d hidden or None, d loss / d weight or None)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=exact, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
    for rows in _rows_to_visit(labels).split(chunk_rows):
        chunk, target = hidden[rows], labels[rows]
        has_target = (target != IGNORE).to(exact)
        target = target.clamp(min=0).unsqueeze(1)
        logits = (chunk @ weight.t()).to(exact)  # (rows, V)
        log_normalizer = logits.logsumexp(1)
        loss += ((log_normalizer - logits.gather(1, target).squeeze(1)) * has_target).sum()
        if not (needs_hidden or needs_weight):
            continue
        # From here on `logits` holds d loss / d logits: softmax - onehot, zero where there is no target.
        logits.sub_(log_normalizer.unsqueeze(1)).exp_()
        logits.scatter_(1, target, logits.gather(1, target) - 1).mul_(has_target.unsqueeze(1))
        grad_logits = logits.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = grad_logits @ weight
        if grad_weight is not None:
            grad_weight += grad_logits.t() @ chunk
    return loss, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _rows_to_visit(labels: Tensor) -> Tensor:
    """Row numbers. The CPU leaves out rows without a target; counting them on a GPU would make the host wait for it."""
    if labels.device.type == "cpu":
        return (labels != IGNORE).nonzero().squeeze(1)
    return torch.arange(len(labels), device=labels.device)
