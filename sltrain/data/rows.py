"""The shape of a row, in training and in evaluation.

truncate_pad: one document a row, its first tokens and </s>, padded on the right; pads have the label -100.
pack: the concatenated documents without gaps; labels are the ids.
best_fit: whole documents, as many as fit, padded on the right; longer ones in pieces of a row's length (best_fit.py).

Where a row may hold several documents, with attention=document a token depends on those before it in its own document
only. The first token of a document, which nothing predicts, then has the label -100, and every token has a position in
its document, from which the model knows where documents begin. A document that began in an earlier row begins again, at
position 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sltrain.data.logical_stream import Row
from sltrain.numeric import IGNORED_LABEL

PADDINGS = ("truncate_pad", "pack", "best_fit")


@dataclass
class RowTensors:
    """Rows as a model reads them, each (rows, T) int64."""

    input_ids: Tensor
    labels: Tensor  # -100 on pads; not shifted
    positions: Tensor | None  # of each token in its document, with attention=document

    @property
    def num_targets(self) -> int:
        """Tokens to predict: labels[:, 1:] that are not -100."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())


def check_row_shape(padding: str, seq_len: int) -> None:
    """Raise ValueError for an unknown padding or a length too short."""
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; it must be {', '.join(PADDINGS[:-1])} or {PADDINGS[-1]}")
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a row needs at least 2 tokens, one to read and one to predict")


def is_per_document(padding: str, attention: str) -> bool:
    """Whether documents of a row are kept apart, which a row of one document needs not."""
    return attention == "document" and padding != "truncate_pad"


def rows_to_tensors(rows: Sequence[Row], seq_len: int, pad_id: int, per_document: bool) -> RowTensors:
    """Rows of at most seq_len ids as tensors; `per_document`: with attention=document."""
    input_ids = np.full((len(rows), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), seq_len), IGNORED_LABEL, dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = labels[i, : len(row.ids)] = row.ids
    if not per_document:
        return RowTensors(torch.from_numpy(input_ids), torch.from_numpy(labels), None)
    begins = np.zeros((len(rows), seq_len), dtype=np.int64)  # where the document of each place begins
    for i, row in enumerate(rows):
        begins[i, row.starts] = row.starts
        labels[i, row.starts] = IGNORED_LABEL
    positions = np.arange(seq_len) - np.maximum.accumulate(begins, axis=1)
    return RowTensors(*map(torch.from_numpy, (input_ids, labels, positions)))
