"""Text -> token ids. Where the tokenizer comes from: load_tokenizer.py.

Everything is one `tokenizers.Tokenizer` (Rust), wrapped for what pretraining needs:

- every document ends with </s> exactly once, whatever the file's post-processor does, and is truncated as Hugging
  Face does it: the first max_len - 1 ids, then </s>;
- a control token written out in a text (`</s>`) is plain text (special_tokens.py), except in runs that began when it
  was not. It is counted, and the first one is reported;
- the model may have fewer ids than the file. T5's file has 32,100 ids, the published models 32,000: the last hundred
  are sentinels (<extra_id_0>), which no text produces. In runs that began earlier a sentinel written out becomes <unk>
  and is counted. A file whose ordinary pieces exceed the model is refused;
- a text that the tokenizer cannot encode is bad data: it has no ids, or ends the run, as on_bad_data says;
- with a pre-tokenizer that never joins a letter or digit with a following space (Metaspace, ByteLevel) the ids before
  such a place do not depend on what follows. Then a long document is tokenized only up to the end of its row, and
  known words are looked up (word_cache.py). Other tokenizers encode the whole text.
"""

import json as json_module
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from sltrain.data.cut_rule import words_are_independent
from sltrain.data.documents import WARNINGS_PER_FILE, DataError
from sltrain.data.special_tokens import AS_TEXT, NAMED, choose_roles, control_tokens, hide, named_token, shown
from sltrain.data.word_cache import WordCache, word_cache
from sltrain.log import ANY_RANK, one_line

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 8  # max_len * 8 characters nearly always hold max_len tokens; if not, the whole text is encoded
# Letters of every script, symbols, emoji and the replacement character: one character in 29 of those that are assigned.
PROBE = "\ufffd" + "".join(
    chr(code)
    for code in (*range(0x20, 0x7F), *range(0xA0, 0x20000, 29))
    if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")
)
TEXTS_PER_CALL = 64  # enough for Rust's threads; the library's record of each token takes memory


class Tokenizer:
    """Encodes documents into ids below `vocab_size`.

    Args:
        json: the content of a tokenizer.json; the attribute `json` keeps it unmodified.
        name: what messages call the tokenizer.
        vocab_size: number of ids of the model; None: as many as the tokenizer has.
        settings: the content of its tokenizer_config.json, of which eos_token, pad_token and unk_token are read.
        eos: the token that ends documents; None: that of `settings`, or the first of EOS_NAMES that exists.
        controls_as_text: whether control tokens written out in a text are plain text.
        on_bad_data: skip or stop, for texts that the tokenizer cannot encode.

    Raises ValueError for an invalid file, and for a tokenizer that does not fit the model. `sentinels_mapped` counts
    the ids that became <unk>, `controls_written` the control tokens written out in texts.
    """

    def __init__(
        self,
        json: str,
        name: str,
        vocab_size: int | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        eos: str | None = None,
        controls_as_text: bool = True,
        on_bad_data: str = "skip",
    ) -> None:
        settings = settings or {}
        self.json, self.name = json, name
        self.controls_as_text = controls_as_text
        self._on_bad_data = on_bad_data
        self.sentinels_mapped = self.controls_written = self.num_unencodable = 0
        try:
            spec = json_module.loads(json)
            if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
                raise ValueError("it describes no model")
            controls = control_tokens(spec, eos, *(named_token(settings, key) for key in NAMED))
            if controls_as_text:
                spec = hide(spec, controls)
            self._tokenizer = tokenizers.Tokenizer.from_str(json_module.dumps(spec) if controls_as_text else json)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer {name} is not a valid tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = {shown(token): i for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        roles = choose_roles(ids, special, name, vocab_size, settings, eos)
        self.vocab_size, self._num_ids = roles.vocab_size, roles.num_ids
        self.eos_id, self.pad_id, self.unk_id = roles.eos_id, roles.pad_id, roles.unk_id
        self._eos_is_named, self._has_sentinels = roles.eos_is_named, roles.num_ids > roles.vocab_size
        self._check_character("a")
        self._prefix = self._leading_specials()
        self._begin, self._end = _packed(self._prefix), _packed([self.eos_id])
        self._holds_control = re.compile(
            "|".join(
                re.escape(token)
                for token in sorted(controls, key=len, reverse=True)
                if controls_as_text or ids[token] < self.vocab_size  # others are counted as sentinels
            )
            or "(?!)"
        )
        self._can_cut = words_are_independent(spec)
        self._words = word_cache(self._tokenizer, spec, controls)

    def copy(self) -> "Tokenizer":
        """One that gives the same ids, for another thread."""
        return Tokenizer(
            self.json,
            self.name,
            self.vocab_size,
            settings=self.settings(),
            controls_as_text=self.controls_as_text,
            on_bad_data=self._on_bad_data,
        )

    @property
    def prefix(self) -> list[int]:
        """Ids that begin every document (bos); mostly none."""
        return self._prefix

    def fingerprint(self) -> str:
        """Identity of the ids this object produces."""
        eos = f", ends with {self._name_of(self.eos_id)}" if self._eos_is_named else ""
        as_text = ", control tokens as text" if self.controls_as_text else ""
        return f"{sha256(self.json.encode()).hexdigest()[:32]}, {self.vocab_size} ids{eos}{as_text}"

    def encode_batch(self, texts: list[str], max_len: int | None = None) -> list[NDArray[np.int32]]:
        """Ids of each text, ending with eos; at most `max_len` (>= 2) of them. A text without tokens has none.

        The library refuses Python strings with lone surrogates.
        """
        found: list[bytes | None] = [None] * len(texts)
        if self._words is not None:
            found = self._looked_up(self._words, texts, max_len)
        others = [i for i, ids in enumerate(found) if ids is None]
        for start in range(0, len(others), TEXTS_PER_CALL):
            part = others[start : start + TEXTS_PER_CALL]
            encodings = self._encode(self._tokenizer.encode_batch_fast, [texts[i] for i in part], max_len)
            for i, encoding in zip(part, encodings, strict=True):
                found[i] = _packed(encoding.ids)
        return [self._finish(ids or b"", max_len) for ids in found]

    def encode_with_bytes(self, texts: list[str], max_len: int | None = None) -> list[tuple[list[int], list[int]]]:
        """As encode_batch, with the number of UTF-8 bytes of the text that each id covers.

        An id covers everything from the end of the id before it to its own end, so white space that the tokenizer
        drops counts for the following word. Ids outside the text (eos, a leading bos) count 0.
        """
        result = []
        encodings = self._encode(self._tokenizer.encode_batch, texts, max_len)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = self._finish(_packed(encoding.ids), max_len).tolist()
            ends = [end for _, end in encoding.offsets[: max(len(ids) - len(self._prefix) - 1, 0)]]
            sizes = _bytes_between(text, ends)
            result.append((ids, [0] * len(self._prefix) + sizes + [0] if ids else []))
        return result

    def refit(self, ids: NDArray[Any], max_len: int | None = None) -> NDArray[np.int32]:
        """What encode_batch gives for a text, from `ids`: all those that the tokenizer's file gives it, as a Tokenizer
        without `vocab_size` does. Raises ValueError for ids that the file does not have."""
        if len(ids) and int(ids.max()) >= self._num_ids:
            raise ValueError(f"id {ids.max()} is none of the {self._num_ids} ids of tokenizer {self.name}")
        ids = ids.astype(np.int32)
        if max_len is not None and len(ids) > max_len:
            ids = ids[:max_len]
            ids[-1] = self.eos_id
        return self._without_sentinels(ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: as in training, but without eos. Raises ValueError for a text without tokens
        or with lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt holds bytes that are no UTF-8 text") from None
        ids = self.encode_batch([text])[0]
        if not len(ids):
            raise ValueError("the prompt holds no text; write at least a word")
        return ids[:-1].tolist()

    def text_stream(self) -> Callable[[int], str]:
        """A function that takes one id after another and returns the text that each adds, without special tokens; ""
        while a character is incomplete."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def special_ids(self) -> dict[str, int]:
        """Ids by Hugging Face's names: bos_token, eos_token, pad_token, unk_token; those that exist."""
        ids = {"bos_token": next(iter(self._prefix), None), "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: i for name, i in {**ids, "unk_token": self.unk_id}.items() if i is not None}

    def special_tokens(self) -> dict[str, str]:
        """The texts of `special_ids`."""
        return {name: self._name_of(i) for name, i in self.special_ids().items()}

    def settings(self) -> dict[str, Any]:
        """What tokenizer_config.json has to say, so that the file is read as this object reads it."""
        return {**self.special_tokens(), AS_TEXT: self.controls_as_text}

    def probe(self) -> None:
        """Raise ValueError if the tokenizer cannot encode some character: a record with it would be lost."""
        try:
            self._tokenizer.encode_batch_fast(list(PROBE), add_special_tokens=False)
        except Exception:  # tokenizers raises bare Exception
            for character in PROBE:
                self._check_character(character)
            raise

    def _check_character(self, character: str) -> None:
        """Raise ValueError if the tokenizer cannot encode this character."""
        try:
            self._tokenizer.encode(character, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"tokenizer {self.name} cannot encode {character!r} (U+{ord(character):04X}): {one_line(error)}; give "
                "it an unknown token or byte fallback, or use another tokenizer, such as tokenizer=bpe:8192"
            ) from None

    def _name_of(self, i: int) -> str:
        return shown(str(self._tokenizer.id_to_token(i)))

    def _encode(
        self, encode_batch: Callable[..., list[tokenizers.Encoding]], texts: list[str], max_len: int | None
    ) -> list[tokenizers.Encoding]:
        """Encode each text without special tokens; with `max_len`, at least its first `max_len` ids."""
        heads = texts if max_len is None else [self._head(text, max_len) for text in texts]
        self._count_controls(heads)
        encodings = self._encoded(encode_batch, heads)
        if max_len is not None:
            short = [i for i, e in enumerate(encodings) if len(e) < max_len and len(heads[i]) < len(texts[i])]
            whole = self._encoded(encode_batch, [texts[i] for i in short])
            for i, encoding in zip(short, whole, strict=True):
                encodings[i] = encoding
        return encodings

    def _looked_up(self, words: WordCache, texts: list[str], max_len: int | None) -> list[bytes | None]:
        """What the table of words gives for each text; nothing if it meets a word that the tokenizer cannot encode."""
        try:
            return words.ids(texts, max_len)
        except Exception as error:
            if type(error) is not Exception:  # what tokenizers raises
                raise
            return [None] * len(texts)

    def _encoded(
        self, encode_batch: Callable[..., list[tokenizers.Encoding]], texts: list[str]
    ) -> list[tokenizers.Encoding]:
        """The library's encodings; an empty one for a text that it cannot encode."""
        try:
            return encode_batch(texts, add_special_tokens=False)
        except Exception as error:
            if type(error) is not Exception:  # what tokenizers raises
                raise
            if len(texts) > 1:
                return [self._encoded(encode_batch, [text])[0] for text in texts]
            self._report_unencodable(texts[0], error)
            return [tokenizers.Encoding()]

    def _report_unencodable(self, text: str, error: Exception) -> None:
        why = f"tokenizer {self.name} cannot encode the text that begins with {text[:40]!r}: {one_line(error)}"
        if self._on_bad_data == "stop":
            raise DataError(f"{why}; use another tokenizer, or set on_bad_data=skip to skip such texts")
        self.num_unencodable += 1
        if self.num_unencodable <= WARNINGS_PER_FILE:
            more = "; no further warnings of this kind" if self.num_unencodable == WARNINGS_PER_FILE else ""
            logger.warning(f"{why}; text skipped{more}", extra=ANY_RANK)

    def _count_controls(self, texts: list[str]) -> None:
        """Count the control tokens that are written out in these texts, and report the first."""
        for text in texts:
            found = self._holds_control.findall(text)
            if found and self.controls_written == 0:
                what = "plain text" if self.controls_as_text else "that control token, as when this run began"
                logger.warning(f"the text holds {found[0]} written out: it is read as {what}", extra=ANY_RANK)
            self.controls_written += len(found)

    def _head(self, text: str, max_len: int) -> str:
        """A beginning of `text` whose ids begin the ids of `text`: it ends between a letter or digit and a space."""
        limit = max_len * CHARS_PER_TOKEN
        if not self._can_cut or len(text) <= limit:
            return text
        end = text.rfind(" ", 1, limit)
        while end > 0 and not text[end - 1].isalnum():
            end = text.rfind(" ", 1, end)
        return text[:end] if end > 0 else text

    def _finish(self, packed: bytes, max_len: int | None) -> NDArray[np.int32]:
        """The ids of a document from those of its text: with bos and eos, truncated, sentinels as <unk>."""
        if packed:
            limit = None if max_len is None else (max_len - 1) * len(self._end)
            packed = (self._begin + packed)[:limit] + self._end
        return self._without_sentinels(np.frombuffer(packed, np.int32))

    def _without_sentinels(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        if not self._has_sentinels or not len(ids) or ids.max() < self.vocab_size:
            return ids
        assert self.unk_id is not None
        is_sentinel = ids >= self.vocab_size
        if self.sentinels_mapped == 0:
            logger.warning(
                f"the text holds {self._name_of(int(ids[is_sentinel][0]))} literally, which has no id "
                f"below {self.vocab_size}: such tokens become {self._name_of(self.unk_id)}"
            )
        self.sentinels_mapped += int(is_sentinel.sum())
        return np.where(is_sentinel, np.int32(self.unk_id), ids)

    def _leading_specials(self) -> list[int]:
        """Ids that the post-processor puts before a text (bos), if any."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a").ids
        return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def _packed(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _bytes_between(text: str, ends: list[int]) -> list[int]:
    """UTF-8 bytes between successive ends (character positions); an end before the previous one counts 0."""
    sizes, last = [], 0
    for end in ends:
        end = max(end, last)
        sizes.append(end - last if text.isascii() else len(text[last:end].encode()))
        last = end
    return sizes
