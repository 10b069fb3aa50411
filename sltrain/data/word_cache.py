"""Text -> ids by looking words up, for tokenizers that treat words independently.

Natural text repeats itself: after some thousand documents nineteen words in twenty have occurred before. Texts are
cut into pieces where that does not change their ids (cut_rule.py, pieces.py), and the ids of a text are those of its
pieces, concatenated. Of some hundred texts at a time, each distinct piece is looked up once, and only those that are
not in the table are tokenized. Measured with T5's file on Wikipedia articles: one core puts 1.4 million tokens a
second into rows of 256, and 0.18 million by calling the tokenizer for each document.

The ids are those of the whole text, whatever the table holds. A piece ending in printable ASCII never interacts with
what follows. Any other piece is normalized together with a following word, and rejected if the normalizer acts across
its end: a combining mark joins the space, a control character vanishes and leaves two spaces, or the piece ends with a
space of another script. A text with a rejected piece, or with an added token written out (`</s>` or `<extra_id_0>`,
which may swallow the spaces around it), is not looked up at all: the caller tokenizes it as a whole.
"""

import re
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import tokenizers

from sltrain.data.cut_rule import CutRule, cut_rule, normalized
from sltrain.data.pieces import cut, join

MAX_ENTRIES = 1 << 19  # about 80 MB; then the table is emptied, so that it follows a corpus that changes
MAX_KEPT_CHARS = 32  # longer pieces (addresses) hardly ever recur
MAX_TRIED_CHARS = 256  # of a piece that is not plain ASCII: a script without spaces is one long piece
CHARS_PER_ID = 4  # characters of a text in the first round per id requested; later rounds take a quarter of that
MAX_CHARS_PER_ROUND = 1 << 16  # of each text, if all ids are requested: the arrays take some ten times as much
BYTES_PER_ID = 4  # ids are stored as int32

REJECTED = array("i", [-1]).tobytes()


def word_cache(
    tokenizer: tokenizers.Tokenizer, spec: dict[str, Any], controls: Collection[str] = ()
) -> "WordCache | None":
    """The table of a tokenizer with tokenizer.json `spec`; None if its words are not independent. Texts with one of
    `controls` written out are not looked up, as those with an added token.

    `tokenizer` must neither truncate nor pad.
    """
    rule = cut_rule(tokenizer, spec)
    added_tokens = [*(token["content"] for token in spec.get("added_tokens", [])), *sorted(controls)]
    return None if rule is None else WordCache(tokenizer, rule, added_tokens)


class WordCache:
    """Piece of text -> its ids. Made by `word_cache`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, rule: CutRule, added_tokens: list[str]) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        self._rule = rule
        self._marks = {mark: array("i", [i]).tobytes() for mark, i in rule.marks.items()}
        self._table = dict(self._marks)
        self._holds_added_token = re.compile("|".join(map(re.escape, added_tokens)) or "(?!)").search
        self._before = self._encode("a")
        self._after = self._encode("a a")[len(self._before) :]

    def ids(self, texts: Sequence[str], max_ids: int | None = None) -> list[bytes | None]:
        """The ids of each text without special tokens (packed int32), with `max_ids` at least its first `max_ids`; None
        for a text with a rejected piece."""
        found: list[list[bytes] | None] = [[] if self._may_begin(text) else None for text in texts]
        starts = [0] * len(texts)
        todo = [i for i, text in enumerate(texts) if text and found[i] is not None]
        length = MAX_CHARS_PER_ROUND if max_ids is None else max_ids * CHARS_PER_ID
        while todo:
            heads = [self._head(texts[i], starts[i], length) for i in todo]
            unfinished = []
            for i, head, ids in zip(todo, heads, self._look_up(heads), strict=True):
                parts = found[i]
                if ids is None or parts is None:
                    found[i] = None
                    continue
                parts.append(ids)
                starts[i] += len(head)
                is_short = max_ids is None or sum(map(len, parts)) < max_ids * BYTES_PER_ID
                if is_short and starts[i] < len(texts[i]):
                    unfinished.append(i)
            todo, length = unfinished, max_ids or length
        return [None if parts is None else b"".join(parts) for parts in found]

    def _may_begin(self, text: str) -> bool:
        """Whether the first piece of a text cannot be confused with one from elsewhere: it lacks white space."""
        if self._rule.begins_as_elsewhere:
            return True
        return text[:1] not in self._rule.space and text[:2].rstrip(self._rule.space) not in self._marks

    def _head(self, text: str, start: int, length: int) -> str:
        """The whole words in `length` characters of the text from `start` on; all the rest if there are none."""
        if start + length >= len(text):
            return text[start:]
        end = max(text.rfind(c, start, start + length) for c in self._rule.space)
        return text[start : max(start, end)].rstrip(self._rule.space) or text[start:]

    def _look_up(self, texts: list[str]) -> list[bytes | None]:
        """The ids of whole texts, none of them empty; None for those with a rejected piece."""
        pieces = cut(texts, self._rule.table)
        known = map(self._table.get, pieces.distinct)
        found = [self._learn(piece) if ids is None else ids for piece, ids in zip(pieces.distinct, known, strict=True)]
        joined = join(found, pieces)
        if REJECTED not in found:
            return [ids.tobytes() for ids in joined]
        return [None if -1 in ids else ids.tobytes() for ids in joined]

    def _learn(self, piece: str) -> bytes:
        """Compute and store the ids of a piece that is not in the table, or REJECTED."""
        if self._holds_added_token(piece):
            ids = None
        elif word := self._word(piece):
            ids = [token.id for token in self._model.tokenize(word)]
        else:
            ids = self._ids_in_context(piece)
        packed = REJECTED if ids is None else array("i", ids).tobytes()
        if len(piece) <= MAX_KEPT_CHARS:
            if len(self._table) >= MAX_ENTRIES:
                self._table = dict(self._marks)
            self._table[piece] = packed
        return packed

    def _word(self, piece: str) -> str:
        """What the pre-tokenizer makes of a piece that is certainly one word; "" for other pieces."""
        has_space = piece[0] in self._rule.space
        if self._rule.plain.fullmatch(piece):
            return self._rule.lead + piece[1:] if has_space else piece
        if self._rule.is_byte_level or not has_space:
            return ""
        body = self._between_words(piece)[1:]
        is_one = body and self._rule.lead not in body and not any(map(str.isspace, body))
        return self._rule.lead + body if is_one else ""

    def _ids_in_context(self, piece: str) -> list[int] | None:
        """The ids of a piece between two words, or at the beginning or end of a text if it can only occur there."""
        is_first, is_last = piece[0] not in self._rule.space, not piece.strip(self._rule.space)
        if not is_last and not self._between_words(piece):
            return None
        ids = self._encode(("" if is_first else "a") + piece + ("" if is_last else " a"))
        before, after = [] if is_first else self._before, [] if is_last else self._after
        end = len(ids) - len(after)
        return ids[len(before) : end] if ids[: len(before)] == before and ids[end:] == after else None

    def _between_words(self, piece: str) -> str:
        """The normalized piece, from between two words; "" if normalization acts across its ends, or if the piece is
        too long to try."""
        if len(piece) > MAX_TRIED_CHARS:
            return ""
        before = "a" if piece[0] in self._rule.space else ""
        text = normalized(self._tokenizer, before + piece + " a")
        inner = text.removeprefix(before).removesuffix(" a")
        is_apart = not before or inner[:1].isspace() or inner[:1] == self._rule.lead
        return inner if is_apart and before + inner + " a" == text and not inner[-1:].isspace() else ""

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
