"""Where a text may be cut so that the concatenated ids of the parts are the ids of the text.

A tokenizer normalizes, splits into words, and encodes each word by itself. So a cut changes nothing where it always
splits, provided that the normalizer does not act across it:

- before white space, for Metaspace, WhitespaceSplit and ByteLevel's pattern. Normalizers may still act across it: a
  combining mark joins a space, a control character vanishes and leaves two spaces. The caller has to check the text
  before the cut (word_cache.py); printable ASCII is safe;
- for ByteLevel without a normalizer also between printable ASCII characters of different classes (letters, digits,
  others), except after an apostrophe (`'s` is one word);
- for the others before a punctuation mark that ends a word after an ASCII letter, if no piece of the vocabulary ends
  with that letter and that mark. The mark is then a token of its own, whatever the rest of the word becomes.

The characters of an added token are kept together.
"""

import re
import string
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sltrain.data.pieces import CUT, CUT_AT_END, KEEP, WHITE_SPACE

SAFE_NORMALIZERS = ("Precompiled", "NFC", "NFKC", "Lowercase", "Strip")
CLASSES = (string.ascii_letters, string.digits, string.punctuation)


@dataclass(frozen=True)
class CutRule:
    """How the texts of one tokenizer are cut, and what is known of the pieces."""

    table: NDArray[np.uint8]  # (256, 256), for pieces.cut
    space: str  # white space before which a text is cut
    marks: dict[str, int]  # punctuation that is cut off the end of a word, and its id
    lead: str  # what the pre-tokenizer writes for the space before a word
    plain: re.Pattern[str]  # pieces that it leaves as one word, unchanged but for the space
    is_byte_level: bool  # it writes other pieces in an alphabet of its own
    begins_as_elsewhere: bool  # it splits the beginning of a text as it would after another word


def words_are_independent(spec: dict[str, Any]) -> bool:
    """Whether the ids before a letter or digit that is followed by a space do not depend on the text from that space
    on; `spec` is the tokenizer.json.

    True for pre-tokenizers that always split there, with normalizers that work character by character or on runs of
    spaces, and without added tokens that contain a space. Unknown parts count as dependent.
    """
    return (
        _splits_at_spaces(_parts(spec.get("pre_tokenizer"), "pretokenizers"))
        and all(map(_is_safe, _parts(spec.get("normalizer"), "normalizers")))
        and not any(" " in token["content"] for token in spec.get("added_tokens", []))
    )


def cut_rule(tokenizer: tokenizers.Tokenizer, spec: dict[str, Any]) -> CutRule | None:
    """The rule of a tokenizer with tokenizer.json `spec`; None if its texts cannot be cut at every space, or are
    encoded differently every time."""
    added = spec.get("added_tokens", [])
    if (
        not words_are_independent(spec)
        or (spec["model"].get("dropout") or 0) > 0
        or any(c.isspace() for token in added for c in token["content"])
        or (spec.get("normalizer") and any(token["normalized"] for token in added))  # found after normalization
    ):
        return None
    splitter = _parts(spec["pre_tokenizer"], "pretokenizers")[0]
    is_byte_level = splitter["type"] == "ByteLevel"
    begins_as_elsewhere = is_byte_level and not splitter.get("add_prefix_space", True)
    space = "".join(c for c in WHITE_SPACE.decode() if _separates(c, tokenizer, splitter["type"]))
    if " " not in space:
        return None
    lead = tokenizer.pre_tokenizer.pre_tokenize_str("a b")[-1][0].removesuffix("b")
    keeps_ascii = not lead.isascii() and all(normalized(tokenizer, c) == c for group in CLASSES for c in group)
    table, marks = np.full((256, 256), KEEP, np.uint8), dict[str, int]()
    if begins_as_elsewhere and not spec.get("normalizer"):
        for before in CLASSES:
            for after in CLASSES:
                if before != after:
                    table[np.ix_([ord(c) for c in before if c != "'"], [ord(c) for c in after])] = CUT
    elif not is_byte_level and keeps_ascii and len(space) == len(WHITE_SPACE):
        marks = _cut_off_marks(table, tokenizer, spec)
    for token in added:
        content = list(token["content"].encode())
        table[content[:-1], content[1:]] = KEEP
    is_space = np.isin(np.arange(256), list(space.encode()))
    table[np.ix_(~is_space, is_space)] = CUT
    one_class = f"([A-Za-z]+|[0-9]+|[{re.escape(string.punctuation)}]+)"
    plain = f" {'?' if begins_as_elsewhere else ''}{one_class}" if is_byte_level else f"[{space}][!-~]+"
    pattern = re.compile(plain if keeps_ascii else "(?!)")  # the latter matches nothing
    return CutRule(table, space, marks, lead, pattern, is_byte_level, begins_as_elsewhere)


def normalized(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    """The text as the pre-tokenizer receives it."""
    return text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)


def _separates(c: str, tokenizer: tokenizers.Tokenizer, splitter: str) -> bool:
    """Whether the pre-tokenizer splits before white space `c`; Metaspace does only where that becomes a space."""
    between = normalized(tokenizer, f"a{c}a")
    return between == "a a" or (between == f"a{c}a" and splitter != "Metaspace")


def _cut_off_marks(table: NDArray[np.uint8], tokenizer: tokenizers.Tokenizer, spec: dict[str, Any]) -> dict[str, int]:
    """Enter the marks that may be cut off the end of a word into the table; return them and their ids."""
    model = spec["model"]
    affixes = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
    if model.get("type") not in ("Unigram", "BPE") or affixes:
        return {}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    endings = {token[-2:] for token in vocabulary}
    in_added = {c for token in spec.get("added_tokens", []) for c in token["content"]}
    marks = {mark: vocabulary[mark] for mark in string.punctuation if mark in vocabulary and mark not in in_added}
    for mark in marks:
        letters = [ord(letter) for letter in string.ascii_letters if letter + mark not in endings]
        table[letters, ord(mark)] = CUT_AT_END
    return marks


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, which may be missing, a single step or a sequence."""
    if not step:
        return []
    return step[key] if step.get("type") == "Sequence" else [step]


def _is_safe(normalizer: dict[str, Any]) -> bool:
    if normalizer.get("type") == "Replace":
        return normalizer.get("pattern") == {"Regex": " {2,}"} and normalizer.get("content") in (" ", "▁")
    return normalizer.get("type") in SAFE_NORMALIZERS


def _splits_at_spaces(pre_tokenizers: list[dict[str, Any]]) -> bool:
    types = [part["type"] for part in pre_tokenizers]
    return (
        types == ["WhitespaceSplit", "Metaspace"]  # T5's own file
        or (types == ["Metaspace"] and pre_tokenizers[0].get("split", True))
        or (types == ["ByteLevel"] and pre_tokenizers[0].get("use_regex", True))
    )
