"""Texts -> their distinct pieces, and back: ids of the pieces -> ids of the texts.

A table says between which bytes a text is cut: mostly between a word and the white space after it, so that `a new word`
has the pieces `a`, ` new` and ` word`. Both directions take a few passes over arrays, without a Python object for each
word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KEEP, CUT, CUT_AT_END = 0, 1, 2  # between two bytes: never, always, if the second one ends a word
WHITE_SPACE = b" \n\t"

_IS_SPACE = np.isin(np.arange(256), list(WHITE_SPACE))


class Pieces(NamedTuple):
    """The pieces of some texts."""

    distinct: list[str]
    which: NDArray[np.int32]  # for each piece of each text in turn, its index in `distinct`
    ends: NDArray[np.int64]  # number of pieces up to the end of each text


def cut(texts: Sequence[str], rule: NDArray[np.uint8]) -> Pieces:
    """The pieces of texts, none of them empty.

    rule: (256, 256), KEEP, CUT or CUT_AT_END for a byte and the next one; it must not cut inside a character.
    """
    import pyarrow  # 0.1 s and 25 MB that not every run needs

    encoded = [text.encode() for text in texts]
    data = b"".join(encoded)
    starts = np.cumsum([0, *map(len, encoded)])
    codes = np.frombuffer(data, np.uint8)
    verdict = rule[codes[:-1], codes[1:]]
    ends_word = np.append(_IS_SPACE[codes[1:]], True)
    ends_word[starts[1:] - 1] = True
    begins = np.append(True, (verdict == CUT) | (verdict == CUT_AT_END) & ends_word[1:])
    begins[starts[:-1]] = True
    bounds = np.append(np.flatnonzero(begins), len(data)).astype(np.int32)
    buffers = [None, pyarrow.py_buffer(bounds), pyarrow.py_buffer(data)]
    coded = pyarrow.Array.from_buffers(pyarrow.utf8(), len(bounds) - 1, buffers).dictionary_encode()
    return Pieces(coded.dictionary.to_pylist(), coded.indices.to_numpy(), np.searchsorted(bounds, starts[1:]))


def join(ids: list[bytes], pieces: Pieces) -> list[NDArray[np.int32]]:
    """The ids of each text, from the packed int32 ids of each distinct piece."""
    distinct_lengths = np.array([len(packed) // 4 for packed in ids])
    distinct_starts = np.cumsum(distinct_lengths) - distinct_lengths
    lengths = distinct_lengths[pieces.which]
    ends = np.cumsum(lengths)
    shifts = distinct_starts[pieces.which] - (ends - lengths)
    joined = np.frombuffer(b"".join(ids), np.int32)[np.arange(ends[-1]) + np.repeat(shifts, lengths)]
    return np.split(joined, ends[pieces.ends[:-1] - 1])
