"""Text -> token ids, from a tokenizer.json, a name on the Hub, or a byte-level BPE trained on the corpus.

Everything is one `tokenizers.Tokenizer` (Rust), wrapped for what pretraining needs:

- every document ends with </s> exactly once, whatever the file's post-processor does, and is truncated as Hugging
  Face does it: the first max_len - 1 ids, then </s>;
- the model may have fewer ids than the file. T5's file has 32,100 ids, the published models 32,000: the last hundred
  are sentinels (<extra_id_0>) that only a literally written sentinel produces. Such ids become <unk> and are counted.
  A file whose ordinary pieces exceed the model is refused;
- with a pre-tokenizer that never joins a letter or digit with a space behind it (Metaspace, ByteLevel) the ids before
  such a place do not depend on what follows. Then a long document is tokenized only as far as its row reaches, and
  words that were met before are looked up (word_cache.py). For other tokenizers the whole text is tokenized.
"""

import json as json_module
import logging
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from sltrain.data.bpe import trained_bpe
from sltrain.data.cut_rule import words_are_independent
from sltrain.data.documents import DataError, NetworkError, Source
from sltrain.data.hub import DEFAULT_RETRY, HubFile
from sltrain.data.word_cache import word_cache

logger = logging.getLogger(__name__)

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>")
UNK_NAMES = ("<unk>", "[UNK]", "<|unk|>")
HUB_ALIASES = {"t5": "google-t5", "gpt2": "openai-community"}  # owners of names that were once written without one
CHARS_PER_TOKEN = (
    8  # a prefix of max_len * 8 characters nearly always holds max_len tokens; if not, the whole text is used
)
TEXTS_PER_CALL = 64  # enough for Rust's threads; what the library finds out about each token takes memory


class Tokenizer:
    """Encodes documents into ids below `vocab_size`.

    `json` is the tokenizer.json as it was found, to be saved beside the model; `sentinels_mapped` counts ids that
    were >= vocab_size and became unk.
    """

    def __init__(self, json: str, name: str, vocab_size: int | None = None) -> None:
        """`vocab_size`: ids of the model; None: as many as the tokenizer has. Raises ValueError if the two do not
        fit."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer {name} is no valid tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json = json
        self.name = name
        self.sentinels_mapped = 0
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        num_ids = max(ids.values(), default=-1) + 1
        num_ordinary = max((i for i in ids.values() if i not in special), default=-1) + 1
        self.vocab_size = num_ids if vocab_size is None else vocab_size
        if num_ordinary > self.vocab_size:
            raise ValueError(
                f"tokenizer {name} has ids up to {num_ordinary - 1} but the model only {self.vocab_size}; "
                f"set model.vocab_size={num_ordinary} or use another tokenizer"
            )
        self.unk_id = self._find(ids, UNK_NAMES)
        eos_id = self._find(ids, EOS_NAMES)
        if eos_id is None:
            raise ValueError(
                f"tokenizer {name} has no end-of-text token ({' '.join(EOS_NAMES)}); documents could not be told apart"
            )
        self.eos_id = eos_id
        pad_id = self._find(ids, PAD_NAMES)
        self.pad_id = eos_id if pad_id is None else pad_id
        self._has_sentinels = num_ids > self.vocab_size
        if self._has_sentinels and self.unk_id is None:
            raise ValueError(
                f"tokenizer {name} has {num_ids} ids, the model {self.vocab_size}, and no <unk> for the others; "
                f"set model.vocab_size={num_ids}"
            )
        self._prefix = self._leading_specials()
        self._begin, self._end = _packed(self._prefix), _packed([self.eos_id])
        spec = json_module.loads(json)
        self._can_cut = words_are_independent(spec)
        self._words = word_cache(self._tokenizer, spec)

    def fingerprint(self) -> str:
        """Identity of the ids this object produces."""
        return f"{sha256(self.json.encode()).hexdigest()[:32]}, {self.vocab_size} ids"

    def encode_batch(self, texts: list[str], max_len: int | None = None) -> list[NDArray[np.int32]]:
        """Ids of each text, ending with eos; at most `max_len` (>= 2) of them. A text without any token gives none.

        Python strings with lone surrogates are refused by the library.
        """
        found: list[bytes | None] = [None] * len(texts)
        if self._words is not None:
            found = self._words.ids(texts, max_len)
        others = [i for i, ids in enumerate(found) if ids is None]
        for start in range(0, len(others), TEXTS_PER_CALL):
            part = others[start : start + TEXTS_PER_CALL]
            encodings = self._encode(self._tokenizer.encode_batch_fast, [texts[i] for i in part], max_len)
            for i, encoding in zip(part, encodings, strict=True):
                found[i] = _packed(encoding.ids)
        return [self._finish(ids or b"", max_len) for ids in found]

    def encode_with_bytes(self, texts: list[str], max_len: int | None = None) -> list[tuple[list[int], list[int]]]:
        """As encode_batch, with the UTF-8 bytes of the text that each id stands for.

        An id stands for everything between the end of the id before it and its own end, so that white space which the
        tokenizer drops counts for the word behind it. Ids that stand for no text (eos, a leading bos) count 0.
        """
        result = []
        encodings = self._encode(self._tokenizer.encode_batch, texts, max_len)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = self._finish(_packed(encoding.ids), max_len).tolist()
            ends = [end for _, end in encoding.offsets[: max(len(ids) - len(self._prefix) - 1, 0)]]
            sizes = _bytes_between(text, ends)
            result.append((ids, [0] * len(self._prefix) + sizes + [0] if ids else []))
        return result

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that is to go on: as in training, but without eos. Raises ValueError for one without tokens,
        and for what is no text."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt holds bytes that are no UTF-8 text") from None
        ids = self.encode_batch([text])[0]
        if not len(ids):
            raise ValueError("the prompt holds no text; write at least a word")
        return ids[:-1].tolist()

    def text_stream(self) -> Callable[[int], str]:
        """A function that takes ids one after the other and returns the text that each adds, without special tokens;
        nothing while a character is incomplete."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def special_ids(self) -> dict[str, int]:
        """Ids by Hugging Face's names, bos_token to unk_token, as far as there are any."""
        ids = {"bos_token": next(iter(self._prefix), None), "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: i for name, i in {**ids, "unk_token": self.unk_id}.items() if i is not None}

    def special_tokens(self) -> dict[str, str]:
        """The texts of `special_ids`."""
        return {name: str(self._tokenizer.id_to_token(i)) for name, i in self.special_ids().items()}

    def _encode(
        self, encode_batch: Callable[..., list[tokenizers.Encoding]], texts: list[str], max_len: int | None
    ) -> list[tokenizers.Encoding]:
        """Encode each text without special tokens, as far as its first `max_len` ids need."""
        heads = texts if max_len is None else [self._head(text, max_len) for text in texts]
        encodings = encode_batch(heads, add_special_tokens=False)
        if max_len is not None:
            short = [i for i, e in enumerate(encodings) if len(e) < max_len and len(heads[i]) < len(texts[i])]
            whole = encode_batch([texts[i] for i in short], add_special_tokens=False)
            for i, encoding in zip(short, whole, strict=True):
                encodings[i] = encoding
        return encodings

    def _finish(self, packed: bytes, max_len: int | None) -> NDArray[np.int32]:
        """Content ids -> ids of the document."""
        if packed:
            limit = None if max_len is None else (max_len - 1) * len(self._end)
            packed = (self._begin + packed)[:limit] + self._end
        ids = np.frombuffer(packed, np.int32)
        if self._has_sentinels and len(ids) and ids.max() >= self.vocab_size:
            ids = self._map_sentinels(ids)
        return ids

    def _map_sentinels(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        assert self.unk_id is not None
        strange = ids >= self.vocab_size
        if self.sentinels_mapped == 0:
            logger.warning(
                f"the text holds {self._tokenizer.id_to_token(int(ids[strange][0]))} literally, which has no id below "
                f"{self.vocab_size}: it and its like become {self._tokenizer.id_to_token(self.unk_id)}"
            )
        self.sentinels_mapped += int(strange.sum())
        return np.where(strange, np.int32(self.unk_id), ids)

    def _head(self, text: str, max_len: int) -> str:
        """A beginning of `text` whose ids begin the ids of `text`: it ends between a letter or digit and a space."""
        limit = max_len * CHARS_PER_TOKEN
        if not self._can_cut or len(text) <= limit:
            return text
        end = text.rfind(" ", 1, limit)
        while end > 0 and not text[end - 1].isalnum():
            end = text.rfind(" ", 1, end)
        return text[:end] if end > 0 else text

    def _leading_specials(self) -> list[int]:
        """Ids that the post-processor puts before a text (bos), if any."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a").ids
        return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])

    def _find(self, ids: dict[str, int], names: tuple[str, ...]) -> int | None:
        return next((ids[name] for name in names if name in ids and ids[name] < self.vocab_size), None)


def load_tokenizer(
    spec: str,
    vocab_size: int | None = None,
    source: Source | None = None,
    cache_dir: str | Path | None = None,
    *,
    holdout_every: int = 0,
) -> Tokenizer:
    """The tokenizer that `spec` names: a tokenizer.json or its folder, `bpe:SIZE`, or a name on the Hugging Face Hub.

    `bpe:SIZE` is trained on the documents of `source` that are not held out, and kept in `cache_dir`: call this on
    one rank first and on the others afterwards. Raises ValueError for a tokenizer that cannot be used, NetworkError
    if the Hub cannot be reached.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said explicitly, so that no fork switches it off
    if spec.startswith("bpe:"):
        if source is None or cache_dir is None:
            raise ValueError(
                f"tokenizer={spec} is trained on a corpus and kept in a cache folder; neither may be missing"
            )
        return Tokenizer(trained_bpe(spec, source, Path(cache_dir), holdout_every), spec, vocab_size)
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists() and not _looks_like_path(spec):
        path = _fetch_from_hub(spec)
    try:
        text = path.read_bytes().decode()  # line ends as they are: the run keeps the file unmodified
    except UnicodeDecodeError:
        raise ValueError(f"tokenizer={spec} is no tokenizer.json: {path} is not text") from None
    except OSError as error:
        raise ValueError(f"tokenizer={spec} cannot be read: {path}: {error.strerror}") from None
    return Tokenizer(text, spec, vocab_size)


def _looks_like_path(spec: str) -> bool:
    return spec.endswith(".json") or spec.startswith((".", "~", "/")) or spec.count("/") > 1


def _fetch_from_hub(spec: str) -> Path:
    """The tokenizer.json of a repository on the Hub, from the Hub's own cache on this machine if it is there."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache  # 0.3 s, for this case only
    from huggingface_hub.errors import HFValidationError

    owner = HUB_ALIASES.get(spec.split("-")[0])
    repo = spec if "/" in spec or owner is None else f"{owner}/{spec}"
    nowhere = f"tokenizer={spec} is neither a file here nor a repository with a tokenizer.json on the Hugging Face Hub"
    try:
        cached = try_to_load_from_cache(repo, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        # Asked first because it fails within seconds; hf_hub_download tries for minutes.
        HubFile(hf_hub_url(repo, "tokenizer.json"), repo, DEFAULT_RETRY).probe()
        return Path(hf_hub_download(repo, "tokenizer.json"))
    except (HFValidationError, DataError) as error:
        raise ValueError(f"{nowhere} ({str(error).splitlines()[0]})") from None
    except Exception as error:  # whatever the HTTP library of the day raises
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise NetworkError(
            f"tokenizer={spec}: {detail}; check the connection, name a tokenizer.json, or use tokenizer=bpe:8192"
        ) from None


def _packed(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _bytes_between(text: str, ends: list[int]) -> list[int]:
    """UTF-8 bytes between successive ends (character positions); an end before the last one gives 0."""
    sizes, last = [], 0
    for end in ends:
        end = max(end, last)
        sizes.append(end - last if text.isascii() else len(text[last:end].encode()))
        last = end
    return sizes
