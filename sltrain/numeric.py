"""Numbers and small functions of tensors that several packages share."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sltrain.parameters import PIECE

_LOWER_HALF = 2**16  # values of the bits that a bfloat16 lacks
IGNORED_LABEL = -100  # label of a position without a target, as in torch and transformers


def pieces(*tensors: Tensor, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same up to PIECE elements of each of these contiguous tensors of one shape, one tuple after the
    other. Of tensors that are rows of others, from element `first` on, they are cut where pieces of those end."""
    head = min(-first % PIECE, tensors[0].numel())
    rest = tensors[0].numel() - head
    sizes = [*([head] if head else []), *[PIECE] * (rest // PIECE), *([rest % PIECE] if rest % PIECE else [])]
    return zip(*(tensor.view(-1).split(sizes or [0]) for tensor in tensors), strict=True)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether all entries of a tensor are one number in memory: a parameter that stands for values held elsewhere."""
    return tensor.dim() > 0 and not any(tensor.stride())


def norm_in_pieces(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The L2 norm of a tensor, 0-d, computed in `dtype`. In pieces: a CPU makes a copy in `dtype` of what it takes the
    norm of."""
    norms = [torch.linalg.vector_norm(piece, dtype=dtype) for (piece,) in pieces(tensor.contiguous())]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(norm: Tensor, largest: float) -> Tensor:
    """What a gradient of this norm, 0-d, is multiplied by so that its norm is at most `largest`; as in
    torch.nn.utils.clip_grad_norm_."""
    return (largest / (norm + 1e-6)).clamp_(max=1.0)


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values, any shape, as bfloat16, up or down at random so that the mean is right; inf and nan stay.
    How: see optim/rounding.py."""
    return round_by(values, random_bits(values.shape, generator))


def random_bits(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """16 bits a number, int32, on the generator's device."""
    return torch.randint(_LOWER_HALF, shape, dtype=torch.int32, device=generator.device, generator=generator)


def round_by(values: Tensor, bits: Tensor) -> Tensor:
    """`stochastic_round` by these random bits, which it overwrites."""
    assert values.dtype == torch.float32, values.dtype
    rounded = bits.add_(values.view(torch.int32)).bitwise_and_(-_LOWER_HALF).view(torch.float32)
    # A nan's pattern is no magnitude: noise could make it a number.
    return torch.where(values.isnan(), values, rounded).bfloat16()
