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
# Of float32 logits. A CPU's memory manager keeps pieces of this size for the next chunk; larger ones it returns to the
# system, and getting them back costs more than the softmax. A GPU wants larger products.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
MIN_CHUNK_ROWS = 128  # fewer rows would leave the matrix products idle


def default_chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows whose float32 logits fill CHUNK_BYTES."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


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
    chunk_rows = chunk_rows or default_chunk_rows(weight.shape[0], device_type)
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
    grad_hidden = torch.empty_like(hidden)
    grad_weight: Tensor | None = None  # in `exact`
    for chunk, label, grad_chunk in zip(
        hidden.split(chunk_rows), labels.unsqueeze(1).split(chunk_rows), grad_hidden.split(chunk_rows), strict=True
    ):
        has_target, target = label != IGNORE, label.clamp(min=0)
        log_p = torch.log_softmax(chunk @ weight.t(), 1, dtype=exact)  # (rows, V)
        loss -= (log_p.gather(1, target) * has_target).sum()
        if not (needs_hidden or needs_weight):
            continue
        # d loss / d logits = softmax - onehot. A row without a target is made zero where it is D wide, not V.
        grad_logits = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=exact)).to(hidden.dtype)
        if needs_hidden:
            torch.mul(grad_logits @ weight, has_target, out=grad_chunk)
        if needs_weight:
            chunk = chunk * has_target
            if grad_weight is None:
                grad_weight = (grad_logits.t() @ chunk).to(exact)
            elif hidden.dtype == exact:
                grad_weight.addmm_(grad_logits.t(), chunk)
            else:
                grad_weight += grad_logits.t() @ chunk
    return loss, grad_hidden if needs_hidden else None, None if grad_weight is None else grad_weight.to(weight.dtype)
