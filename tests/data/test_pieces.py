"""Cutting and joining against a plain loop over the bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sltrain.data.pieces import CUT, CUT_AT_END, KEEP, cut, join

TEXTS = st.lists(st.text(alphabet="ab,. \n\té漢", min_size=1, max_size=30), min_size=1, max_size=5)


def random_rule(seed):
    """Any verdict between ASCII characters, none inside or beside others."""
    rule = np.full((256, 256), KEEP, np.uint8)
    rule[:128, :128] = np.random.default_rng(seed).choice([KEEP, CUT, CUT_AT_END], (128, 128))
    return rule


def cut_slowly(text, rule):
    data, pieces = text.encode(), [b""]
    for i, byte in enumerate(data):
        ends_word = i + 1 == len(data) or data[i + 1] in b" \n\t"
        verdict = rule[data[i - 1], byte] if i else KEEP
        if verdict == CUT or (verdict == CUT_AT_END and ends_word):
            pieces.append(b"")
        pieces[-1] += bytes([byte])
    return [piece.decode() for piece in pieces]


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 5))
def test_pieces_are_those_of_a_loop_and_ids_come_back_in_order(texts, seed):
    rule = random_rule(seed)
    pieces = cut(texts, rule)
    expected = [cut_slowly(text, rule) for text in texts]
    assert sorted(pieces.distinct) == sorted({piece for text in expected for piece in text})
    numbered = np.array(pieces.distinct, object)[pieces.which]
    assert [part.tolist() for part in np.split(numbered, pieces.ends[:-1])] == expected
    ids = {piece: [ord(c) for c in piece if c != "a"] for piece in pieces.distinct}  # some pieces have none
    joined = join([np.array(ids[piece], np.int32).tobytes() for piece in pieces.distinct], pieces)
    assert [part.tolist() for part in joined] == [[i for piece in text for i in ids[piece]] for text in expected]


def test_white_space_goes_with_the_word_after_it():
    rule = np.full((256, 256), KEEP, np.uint8)
    rule[ord("a") : ord("z") + 1, list(b" \n")] = CUT
    pieces = cut(["a new\n word a new", "a"], rule)
    assert [pieces.distinct[i] for i in pieces.which] == ["a", " new", "\n word", " a", " new", "a"]
    assert pieces.ends.tolist() == [5, 6]
