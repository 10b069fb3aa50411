"""Adam's averages in 8-bit codes: blocks of 256 entries share a scale, their largest magnitude, and codes are dense
near zero (dynamic quantization, Dettmers, arXiv 1511.04561; for optimizers, Dettmers et al., arXiv 2110.02861).

    0, 1 and, for e = 0 .. 6, the middles of 2^(6 - e) equal parts of [0.1, 1] x 10^-e, of both signs; without a sign
    twice as many parts

A code is within 0.7 % of the largest entry (0.4 % without a sign), far closer for small entries, and a millionth of
the largest is still told from zero: enough for second moments, which are divided by. Codes are the nearest ones on
every device; those that bitsandbytes 0.50 finds on a CPU are not, for 3 % of the squares of normal numbers.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def new_averages(weight: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """Averages of tensors of this shape, zero, where `weight` is: two of codes, uint8, two of scales, float32."""
    codes = {key: weight.new_full(shape, _zero(signed), dtype=torch.uint8) for key, signed in SIGNED.items()}
    num_blocks = -(-codes["exp_avg"].numel() // BLOCK)
    scales = {f"{key}_scales": weight.new_zeros(num_blocks, dtype=torch.float32) for key in SIGNED}
    return codes | scales


def averages(grad: Tensor, state: dict[str, Any], betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """m and v, float32, once those of `state` have taken in the float32 `grad`; before they are rounded to codes."""
    mean = _decode(state, "exp_avg").mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    _encode(mean, state, "exp_avg")
    squares = _decode(state, "exp_avg_sq").mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    _encode(squares, state, "exp_avg_sq")
    return mean, squares


def code_values(signed: bool) -> Tensor:
    """The 256 values of codes, ascending, (256,) float32."""
    values = [0.0, 1.0]
    for e in range(7):
        parts = 2 ** (6 - e) * (1 if signed else 2)
        middles = (0.1 + 0.9 * (torch.arange(parts, dtype=torch.float64) + 0.5) / parts) * 10.0**-e
        values += middles.tolist() + (-middles).tolist() * signed
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _values_and_borders(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values, and the points halfway between them."""
    values = code_values(signed)
    return values.to(device), ((values[1:].double() + values[:-1].double()) / 2).float().to(device)


@cache
def _zero(signed: bool) -> int:
    """The code of zero."""
    return code_values(signed).tolist().index(0.0)


def _decode(state: dict[str, Any], key: str) -> Tensor:
    codes = state[key]
    values, _ = _values_and_borders(SIGNED[key], codes.device)
    return values[codes.int()].mul_(_spread(state[f"{key}_scales"], codes))


def _encode(values: Tensor, state: dict[str, Any], key: str) -> None:
    """Replace codes and scales by those nearest to `values`."""
    _, borders = _values_and_borders(SIGNED[key], values.device)
    flat = values.reshape(-1)
    scales = state[f"{key}_scales"]
    scales.copy_(torch.nn.functional.pad(flat.abs(), (0, -len(flat) % BLOCK)).view(-1, BLOCK).amax(1))
    shares = values / _spread(scales.clamp_min(1e-38), values)
    state[key].copy_(torch.bucketize(shares, borders, out_int32=True))


def _spread(of_block: Tensor, like: Tensor) -> Tensor:
    """A number of each block, as a tensor of the shape of `like`."""
    return of_block.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)
