"""Numbers and small functions of tensors that several packages share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sltrain.parameters import PIECE

IGNORED_LABEL = -100  # label of a position without a target, as in torch and transformers


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same up to PIECE elements of each of these contiguous tensors of one shape, one tuple after the
    other."""
    return zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)


def norm_in_pieces(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The L2 norm of a tensor, 0-d, computed in `dtype`. In pieces: a CPU makes a copy in `dtype` of what it takes the
    norm of."""
    norms = [torch.linalg.vector_norm(piece, dtype=dtype) for (piece,) in pieces(tensor.contiguous())]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(norm: Tensor, largest: float) -> Tensor:
    """What a gradient of this norm, 0-d, is multiplied by so that its norm is at most `largest`; as in
    torch.nn.utils.clip_grad_norm_."""
    return (largest / (norm + 1e-6)).clamp_(max=1.0)
