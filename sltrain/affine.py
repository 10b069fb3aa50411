"""A tensor as unsigned codes of 4 or 8 bits: groups of 256 entries share a step s and a zero point z (Q-GaLore, Zhang
et al., arXiv 2407.08296).

    s = (max - min) / (2^bits - 1),   z = round(-min / s),   code = round(w / s) + z,   w is nearly s (code - z)

The range of every group includes zero, so that zero has a code and groups of one sign, as those of a leading singular
vector can be, lie within the codes.

Rounded at random a code is floor(w / s + u) + z with u uniform in [0, 1), which is right on average. Here
s = (max - min) / (2^bits - 2) and z = ceil(-min / s): one code is left over, so that no draw leaves the codes. (The
authors keep the s and z from above and clamp, which pulls the extremes of a group inwards.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sltrain.parameters import PIECE

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


def encode(values: Tensor, bits: int, generator: torch.Generator | None = None) -> Codes:
    """The nearest codes of float32 values of any shape; with a generator, on their device, codes at random."""
    flat = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % GROUP)).view(-1, GROUP)
    least, most = flat.amin(1, keepdim=True).clamp_max(0), flat.amax(1, keepdim=True).clamp_min(0)
    largest = 2**bits - 1
    steps = (most - least) / (largest if generator is None else largest - 1)
    divisor = steps.clamp_min(1e-38)
    if generator is None:
        zeros = (-least / divisor).round_()
        codes = (flat / divisor).round_()
    else:
        zeros = (-least / divisor).ceil_()
        codes = torch.rand(flat.shape, generator=generator, device=flat.device).addcdiv_(flat, divisor).floor_()
    codes = codes.add_(zeros).clamp_(0, largest).to(torch.uint8).view(-1)[: values.numel()]
    return Codes(_pack(codes) if bits == 4 else codes, steps.view(-1), zeros.to(torch.uint8).view(-1))


def decode(stored: Codes, numel: int, bits: int) -> Tensor:
    """The values, (numel,) float32."""
    codes = (_unpack(stored.codes) if bits == 4 else stored.codes)[:numel]
    if numel % GROUP:
        codes = torch.nn.functional.pad(codes, (0, -numel % GROUP))
    groups = codes.view(-1, GROUP).float().sub_(stored.zeros[:, None]).mul_(stored.steps[:, None])
    return groups.view(-1)[:numel]


@dataclass(frozen=True)
class CodedTensor:
    """A tensor that is held as 8-bit codes, read and written in pieces."""

    codes: Tensor  # uint8, of the tensor's shape
    steps: Tensor  # int32, the bits of float32 steps: a cast of the model to another dtype leaves them alone
    zeros: Tensor  # uint8

    @classmethod
    def zero(cls, like: Tensor) -> "CodedTensor":
        """A tensor of zeros of the shape of `like`, on its device (meta included)."""
        codes, steps, zeros = no_codes(like, like.numel(), bits=8)
        return cls(codes.view(like.shape), steps.view(torch.int32), zeros)

    def pieces(self) -> Iterator[tuple[slice, Codes]]:
        """Of up to PIECE entries each: where it lies in row-major order, and its codes."""
        flat, steps, num_groups = self.codes.view(-1), self.steps.view(torch.float32), PIECE // GROUP
        starts = range(0, flat.numel(), PIECE)
        for start, own_steps, zeros in zip(starts, steps.split(num_groups), self.zeros.split(num_groups), strict=True):
            where = slice(start, start + PIECE)
            yield where, Codes(flat[where], own_steps, zeros)

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in `dtype`."""
        values = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for where, stored in self.pieces():
            values.view(-1)[where] = decode(stored, len(stored.codes), bits=8)
        return values

    def write(self, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Hold these values of the tensor's shape, rounded to the nearest code or, with a generator, at random."""
        for where, stored in self.pieces():
            new = encode(values.reshape(-1)[where].float(), 8, generator)
            for old, part in zip(stored, new, strict=True):
                old.copy_(part)


def _pack(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the lower half."""
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)
