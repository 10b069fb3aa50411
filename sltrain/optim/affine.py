"""A tensor as unsigned codes of 4 or 8 bits: groups of 256 entries share a step s and a zero point z (Q-GaLore, Zhang
et al., arXiv 2407.08296).

    s = (max - min) / (2^bits - 1),   z = round(-min / s),   code = round(w / s) + z,   w is nearly s (code - z)

The range of every group includes zero, so that zero has a code and groups of one sign, as those of a leading singular
vector can be, lie within the codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 256


class Codes(NamedTuple):
    """A tensor of n entries in row-major order."""

    codes: Tensor  # uint8, one of 8 bits a byte, or two of 4 bits
    steps: Tensor  # float32, s of each group
    zeros: Tensor  # uint8, z of each group


def no_codes(like: Tensor, numel: int, bits: int) -> Codes:
    """The codes of `numel` zeros, where `like` is (meta included)."""
    groups = -(-numel // GROUP)
    codes = like.new_zeros(-(-numel * bits // 8), dtype=torch.uint8)
    return Codes(codes, like.new_zeros(groups, dtype=torch.float32), like.new_zeros(groups, dtype=torch.uint8))


def encode(values: Tensor, bits: int) -> Codes:
    """The nearest codes of float32 values of any shape."""
    flat = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % GROUP)).view(-1, GROUP)
    least, most = flat.amin(1, keepdim=True).clamp_max(0), flat.amax(1, keepdim=True).clamp_min(0)
    largest = 2**bits - 1
    steps = (most - least) / largest
    divisor = steps.clamp_min(1e-38)
    zeros = (-least / divisor).round_()
    codes = (flat / divisor).round_().add_(zeros).clamp_(0, largest).to(torch.uint8).view(-1)[: values.numel()]
    return Codes(_pack(codes) if bits == 4 else codes, steps.view(-1), zeros.to(torch.uint8).view(-1))


def decode(stored: Codes, numel: int, bits: int) -> Tensor:
    """The values, (numel,) float32."""
    codes = (_unpack(stored.codes) if bits == 4 else stored.codes)[:numel].float()
    return codes.sub_(_spread(stored.zeros, numel)).mul_(_spread(stored.steps, numel))


def _spread(of_group: Tensor, numel: int) -> Tensor:
    return of_group.repeat_interleave(GROUP)[:numel]


def _pack(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the lower half."""
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)
