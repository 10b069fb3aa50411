"""The shape of a row, in training and in evaluation.

truncate_pad: one document a row, its first tokens and </s>, padded on the right; pads have the label -100.
pack: the concatenated documents without gaps; labels are the ids.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sltrain.numeric import IGNORED_LABEL


def check_row_shape(padding: str, seq_len: int) -> None:
    """Raise ValueError for an unknown padding or a length too short."""
    if padding not in ("truncate_pad", "pack"):
        raise ValueError(f"padding is {padding!r}; it must be truncate_pad or pack")
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a row needs at least 2 tokens, one to read and one to predict")


def rows_to_tensors(rows: Sequence[NDArray[np.int32]], seq_len: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and labels, (rows, seq_len) int64, of rows of at most seq_len ids."""
    input_ids = np.full((len(rows), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq_len), IGNORED_LABEL, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = labels[i, : len(row)] = row
    return torch.from_numpy(input_ids), torch.from_numpy(labels)
