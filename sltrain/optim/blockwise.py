"""A tensor as 8-bit codes: blocks of 256 share one scale, their largest magnitude, and codes are linear in between.

Momentum kept so is enough for Muon (Gupta et al., arXiv 2509.23106): unlike Adam's second moment it is never divided
by, so that small entries may round to zero.
"""

import torch
from torch import Tensor

BLOCK = 256


def new_codes(weight: Tensor) -> dict[str, Tensor]:
    """Zeros of the shape of `weight`: "codes", int8, and "scales", float32."""
    num_blocks = -(-weight.numel() // BLOCK)
    return {
        "codes": weight.new_zeros(weight.shape, dtype=torch.int8),
        "scales": weight.new_zeros(num_blocks, dtype=torch.float32),
    }


def decode(state: dict[str, Tensor]) -> Tensor:
    """The values, float32."""
    codes, scales = state["codes"], state["scales"]
    return codes.float().mul_(_spread(scales / 127, codes))


def encode(values: Tensor, state: dict[str, Tensor]) -> None:
    """Replace the codes and scales by those nearest to `values`."""
    flat = values.reshape(-1)
    padded = torch.nn.functional.pad(flat.abs(), (0, -flat.numel() % BLOCK))
    state["scales"].copy_(padded.view(-1, BLOCK).amax(1))
    step = _spread(state["scales"] / 127, values)
    state["codes"].copy_((values / step.clamp_min(1e-38)).round_())


def _spread(of_block: Tensor, like: Tensor) -> Tensor:
    """A number of each block, as a tensor of the shape of `like`."""
    return of_block.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)
