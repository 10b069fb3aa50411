"""Sum of token cross-entropies without ever holding the logits of all rows.

    N rows, D hidden size, V vocabulary       loss = sum_n  logsumexp(h_n W^T) - h_n W_{y_n}^T
    dlogits = softmax(h W^T) - onehot(y),     dh = dlogits W,     dW = dlogits^T h

z_loss, with z_n = logsumexp(h_n W^T), adds  z_loss * sum_n z_n^2  to what is trained, which keeps the logits from
drifting (Chowdhery et al., arXiv 2204.02311): softmax becomes (1 + 2 z_loss z_n) softmax in the gradient. The value
returned stays the cross-entropy.

The logits of one 512 x 256 batch over 32,000 tokens are 16.8 GB in float32, and so is their gradient: far more than the
rest of a small model. So the forward pass computes logits, loss and their gradient for one chunk of rows at a time;
backward only multiplies by the gradient of the sum. Kept for backward are dh (N, D) and the smaller of

    many rows    dW (V, D), accumulated in float32 so that many small bfloat16 contributions are not rounded away
    few rows     dlogits (N, V) and h, from which backward computes dW in one product: a batch of one sequence of a 7B
                 model then needs 16 MB beside the gradient itself, not 786

The logits are a product in the dtype of h, to which W is cast; softmax and loss are float32 (float64 for float64
input). The gradient of a float32 W whose products are bfloat16 is that of the accumulator, not rounded. Differentiable
once. torch's `linear_cross_entropy` has the same idea, but is not in every release this package supports (torch >=
2.11), and its options still change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sltrain.numeric import IGNORED_LABEL

# Of float32 logits. A CPU's allocator keeps pieces of this size for the next chunk; larger ones go back to the system,
# and getting them again costs more than the softmax. A GPU needs larger products.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
MIN_CHUNK_ROWS = 128  # with fewer, matrix products are inefficient
SCALE_ROWS = 1024  # of a gradient, scaled in float32 at a time


def default_chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows whose float32 logits fill CHUNK_BYTES."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def keeps_logit_gradients(num_rows: int, hidden_size: int, element_size: int, weight_size: int) -> bool:
    """Whether dlogits (N, V) and h are kept for backward, being smaller than dW (V, D) and its float32 accumulator.
    Sizes are bytes: of an element of h, and of W."""
    accumulated = 4 if weight_size < 4 else 0
    return num_rows * element_size <= hidden_size * (weight_size + accumulated)


# Tracing would unroll the loop over chunks for every number of rows. This is torch.compiler.disable, but imports the
# compiler (a second) at the first call instead of here.
@torch._disable_dynamo
def chunked_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """Sum over rows of cross-entropy(hidden weight^T, labels), 0-d float32, in nats.

    hidden (N, D), weight (V, D), labels (N,) int64 where -100 marks rows without a target. `chunk_rows` bounds the rows
    of logits held at a time (None: by CHUNK_BYTES). The gradients are those of this sum and of `z_loss` times the sum
    of squared logsumexps. Under torch.no_grad only the loss is computed.
    """
    device_type = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device_type)
    if has_autocast and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    chunk_rows = chunk_rows or default_chunk_rows(weight.shape[0], device_type)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropySum.apply(hidden, weight, labels, chunk_rows, z_loss)
    return _run_chunks(hidden, weight.to(hidden.dtype), labels, chunk_rows, _Gradients())


@dataclass
class _Gradients:
    """The gradients that chunks compute, None for those not needed; `z_loss` is part of what is differentiated."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    z_loss: float = 0.0


class _ChunkedCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, z_loss: float) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        gradients = _Gradients(torch.empty_like(hidden) if needs_hidden else None, z_loss=z_loss)
        sizes = (len(hidden), hidden.shape[1], hidden.element_size(), weight.element_size())
        if needs_weight and keeps_logit_gradients(*sizes):
            gradients.logits = hidden.new_empty(len(hidden), len(weight))
        elif needs_weight:
            gradients.weight = weight.new_zeros(weight.shape, dtype=_exact(hidden))
        loss = _run_chunks(hidden, weight.to(hidden.dtype), labels, chunk_rows, gradients)
        grad_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        # A row without a target is zeroed in h, which is D wide, not in dlogits, which is V wide.
        source = None if gradients.logits is None else hidden * (labels != IGNORED_LABEL).unsqueeze(1)
        ctx.save_for_backward(gradients.hidden, grad_weight, gradients.logits, source)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_logits, hidden = ctx.saved_tensors
        if grad_logits is not None:
            grad_weight = (grad_logits.t() @ _scaled(hidden, grad_loss)).to(ctx.weight_dtype)
        elif grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_loss)
        return None if grad_hidden is None else _scaled(grad_hidden, grad_loss), grad_weight, None, None, None


def _scaled(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix * factor, multiplied in the factor's float32: 1 / num_tokens rounded to bfloat16 would scale every
    gradient by up to 0.4 % too much or too little."""
    if matrix.dtype == factor.dtype:
        return matrix * factor
    result = torch.empty_like(matrix)
    for to, rows in zip(result.split(SCALE_ROWS), matrix.split(SCALE_ROWS), strict=True):
        to.copy_(rows.to(factor.dtype) * factor)
    return result


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def _run_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, gradients: _Gradients) -> Tensor:
    """The sum of the losses; fills `gradients`."""
    loss = torch.zeros((), dtype=_exact(hidden), device=hidden.device)
    for first in range(0, len(hidden), chunk_rows):
        loss -= _run_chunk(hidden, weight, labels, slice(first, first + chunk_rows), gradients)
    return loss


def _run_chunk(hidden: Tensor, weight: Tensor, labels: Tensor, rows: slice, gradients: _Gradients) -> Tensor:
    """The sum of the log-probabilities of these rows' labels; fills their part of `gradients`. A function, so that the
    logits are freed."""
    exact, chunk, label = _exact(hidden), hidden[rows], labels[rows].unsqueeze(1)
    has_target, target = label != IGNORED_LABEL, label.clamp(min=0)
    logits = chunk @ weight.t()  # (rows, V)
    log_p = torch.log_softmax(logits, 1, dtype=exact)
    of_target = log_p.gather(1, target)
    total = (of_target * has_target).sum()
    logsumexp = logits.gather(1, target).to(exact) - of_target if gradients.z_loss else None
    del logits
    if gradients.hidden is None and gradients.weight is None and gradients.logits is None:
        return total
    # d loss / d logits = softmax - onehot
    softmax = log_p.exp_() if logsumexp is None else log_p.exp_().mul_(1 + 2 * gradients.z_loss * logsumexp)
    grad_logits = softmax.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact))
    del log_p, softmax  # twice the size of what follows, in bfloat16
    if gradients.logits is None:
        grad_logits = grad_logits.to(hidden.dtype)
    else:
        grad_logits = gradients.logits[rows].copy_(grad_logits)
    if gradients.hidden is not None:
        torch.mul(grad_logits @ weight, has_target, out=gradients.hidden[rows])
    if gradients.weight is not None:
        chunk = chunk * has_target
        if hidden.dtype == exact:
            gradients.weight.addmm_(grad_logits.t(), chunk)
        else:
            gradients.weight += grad_logits.t() @ chunk
    return total
