"""Text -> token ids, from a tokenizer.json, a name on the Hub, or a byte-level BPE trained on the corpus.

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
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from sltrain.data.bpe import trained_bpe
from sltrain.data.cut_rule import words_are_independent
from sltrain.data.documents import WARNINGS_PER_FILE, DataError, NetworkError, Source
from sltrain.data.download import hub_error, probe
from sltrain.data.special_tokens import (
    AS_TEXT,
    CONFIG_FILE,
    EOS_NAMES,
    NAMED,
    PAD_NAMES,
    UNK_NAMES,
    control_tokens,
    hide,
    named_token,
    read_settings,
    shown,
)
from sltrain.data.word_cache import WordCache, word_cache
from sltrain.log import ANY_RANK

logger = logging.getLogger(__name__)

HUB_ALIASES = {"t5": "google-t5", "gpt2": "openai-community"}  # owners of names that were once written without one
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
        ids = self._choose_ids(settings, eos, vocab_size)
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

    def _choose_ids(self, settings: Mapping[str, Any], eos: str | None, vocab_size: int | None) -> dict[str, int]:
        """Set the size of the vocabulary and the ids with a role: end of text, padding, unknown. Returns the id of each
        token. Raises ValueError for a tokenizer that does not fit the model, or lacks one of them."""
        name = self.name
        ids = {shown(token): i for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        num_ids = max(ids.values(), default=-1) + 1
        num_ordinary = max((i for i in ids.values() if i not in special), default=-1) + 1
        self.vocab_size = num_ids if vocab_size is None else vocab_size
        if num_ordinary > self.vocab_size:
            raise ValueError(
                f"tokenizer {name} has ids up to {num_ordinary - 1} but the model only {self.vocab_size}; "
                f"set model.vocab_size={num_ordinary} or use another tokenizer"
            )

        def find(names: tuple[str, ...], key: str) -> int | None:
            named = named_token(settings, key)
            names = names if named is None else (named, *names)
            return next((ids[name] for name in names if ids.get(name, self.vocab_size) < self.vocab_size), None)

        self.unk_id, pad_id = find(UNK_NAMES, "unk_token"), find(PAD_NAMES, "pad_token")
        eos_id = find(EOS_NAMES, "eos_token") if eos is None else ids.get(eos)
        if eos is not None and (eos_id is None or eos_id >= self.vocab_size):
            raise ValueError(f"tokenizer_eos={eos}: tokenizer {name} has no such token among its {self.vocab_size} ids")
        if eos_id is None:
            raise ValueError(
                f"tokenizer {name} has no end-of-text token ({' '.join(EOS_NAMES)}), and nothing would separate "
                "documents; name one of its tokens: tokenizer_eos=TOKEN"
            )
        self._eos_is_named = eos_id != next((ids[token] for token in EOS_NAMES if token in ids), None)
        self._num_ids, self._has_sentinels = num_ids, num_ids > self.vocab_size
        if self._has_sentinels and self.unk_id is None:
            raise ValueError(
                f"tokenizer {name} has {num_ids} ids, the model {self.vocab_size}, and no <unk> for the others; "
                f"set model.vocab_size={num_ids}"
            )
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        return ids

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
                f"tokenizer {self.name} cannot encode {character!r} (U+{ord(character):04X}): {_one_line(error)}; give "
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
        why = f"tokenizer {self.name} cannot encode the text that begins with {text[:40]!r}: {_one_line(error)}"
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


def load_tokenizer(
    spec: str,
    vocab_size: int | None = None,
    source: Source | None = None,
    cache_dir: str | Path | None = None,
    *,
    holdout_every: int = 0,
    eos: str | None = None,
    on_bad_data: str = "skip",
    begun_with: dict[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer that `spec` names: a tokenizer.json or its folder, `bpe:SIZE`, or a name on the Hugging Face Hub.

    A tokenizer_config.json beside the file, and `eos`, say which tokens end and pad texts. `begun_with` is the content
    of that file in the folder of a run that goes on, which then counts instead; it is empty for a run of an earlier
    version. `bpe:SIZE` is trained on the documents of `source` that are not held out, and cached in `cache_dir`: call
    this on one rank first and on the others afterwards. Raises ValueError for a tokenizer that cannot be used,
    NetworkError if the Hub cannot be reached.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # otherwise a fork switches it off
    if spec.startswith("bpe:"):
        if source is None or cache_dir is None:
            raise ValueError(f"tokenizer={spec} needs a source to train on and a cache_dir")
        text, settings = trained_bpe(spec, source, Path(cache_dir), holdout_every), begun_with or {}
    else:
        path = _find_file(spec)
        settings = read_settings(path.parent) if begun_with is None else begun_with
        try:
            # Line ends unchanged: the run keeps the file as it is, but for the mark that some editors begin it with.
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"tokenizer={spec} is not a tokenizer.json: {path} is not UTF-8 text") from None
        except OSError as error:
            raise ValueError(f"tokenizer={spec} cannot be read: {path}: {error.strerror}") from None
    tokenizer = Tokenizer(
        text,
        spec,
        vocab_size,
        settings=settings,
        eos=eos,
        controls_as_text=begun_with is None or bool(begun_with.get(AS_TEXT, False)),
        on_bad_data=on_bad_data,
    )
    if begun_with is None:
        tokenizer.probe()
    return tokenizer


def _find_file(spec: str) -> Path:
    """The tokenizer.json that `spec` names, on this machine or downloaded. It may not exist."""
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    _refuse_other_formats(spec, path)
    looks_like_path = spec.endswith(".json") or spec.startswith((".", "~", "/")) or spec.count("/") > 1
    return path if path.exists() or looks_like_path else _fetch_from_hub(spec)


def _refuse_other_formats(spec: str, path: Path) -> None:
    """Raise ValueError for a SentencePiece model, or a folder with one or with vocab.json and no tokenizer.json."""
    others = [path] if path.suffix in (".model", ".vocab") else []
    if path.name == "tokenizer.json" and not path.exists():
        others = [other for pattern in ("*.model", "vocab.json") for other in path.parent.glob(pattern)]
    if others and others[0].exists():
        folder = others[0].parent
        raise ValueError(
            f"tokenizer={spec}: {others[0]} is not a tokenizer.json; convert it once, where transformers and "
            f'sentencepiece are installed: python -c "from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{folder}').save_pretrained('NEW')\", then use tokenizer=NEW/tokenizer.json"
        )


def _fetch_from_hub(spec: str) -> Path:
    """The tokenizer.json of a repository on the Hub, downloaded with its tokenizer_config.json unless it is in the
    Hub's cache on this machine."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # 0.3 s, for this case only
    from huggingface_hub.errors import EntryNotFoundError

    owner = HUB_ALIASES.get(spec.split("-")[0])
    repo = spec if "/" in spec or owner is None else f"{owner}/{spec}"
    try:
        cached = try_to_load_from_cache(repo, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        probe(repo, "tokenizer.json")  # fails within seconds; hf_hub_download retries for minutes
        with suppress(EntryNotFoundError):  # a repository may lack it
            hf_hub_download(repo, CONFIG_FILE)
        return Path(hf_hub_download(repo, "tokenizer.json"))  # last: where it is, the other was asked for
    except Exception as error:  # the HTTP library's exception classes change between releases
        detail = hub_error(error, f"{repo}/tokenizer.json")
        if isinstance(detail, DataError):
            raise ValueError(
                f"tokenizer={spec} is neither a file here nor a repository with a tokenizer.json on the Hugging Face "
                f"Hub ({detail})"
            ) from None
        raise NetworkError(
            f"tokenizer={spec}: {detail}; check the connection, name a tokenizer.json, or use tokenizer=bpe:8192"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


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
