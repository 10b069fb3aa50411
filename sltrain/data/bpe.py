"""`tokenizer=bpe:SIZE`: a byte-level BPE trained on the corpus itself and cached.

For corpora that no published tokenizer fits, and for machines without a network. It encodes every text, because the
256 bytes are pieces. Training is deterministic: it reads a fixed sample of the documents that are not held out, and
the cache key covers the corpus, the size and the sample. 8,192 pieces on the standard library take about 2 s.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import tokenizers

from sltrain.data.documents import DataError, Source, is_held_out
from sltrain.data.mixture import Mixture

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when train_bpe changes, so that tokenizers cached by older versions are not used
SAMPLE_CHARS = 10_000_000  # text to train on
SAMPLE_SHARDS = 16  # shards it is taken from
MIN_SIZE = 256 + 3  # the bytes and <pad>, </s>, <unk>
MAX_SIZE = 1_000_000


def train_bpe(texts: Iterator[str], size: int) -> str:
    """The tokenizer.json of a byte-level BPE with at most `size` ids (<pad> 0, </s> 1, <unk> 2). Deterministic."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def trained_bpe(spec: str, source: Source, cache_dir: Path, holdout_every: int) -> str:
    """The tokenizer.json of `bpe:SIZE` for this corpus, trained unless it is in the cache.

    Raises ValueError for a wrong SIZE, DataError for a corpus without text.
    """
    digits = spec.removeprefix("bpe:")
    if not digits.isdecimal() or not MIN_SIZE <= int(digits) <= MAX_SIZE:
        raise ValueError(f"tokenizer={spec}: SIZE must be a number from {MIN_SIZE} to {MAX_SIZE:,}, as in bpe:8192")
    size = int(digits)
    recipe = [FORMAT, size, source.fingerprint(), holdout_every, SAMPLE_CHARS, SAMPLE_SHARDS]
    path = cache_dir / f"bpe-{size}-{sha256(repr(recipe).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    source.check()
    logger.info(f"training a byte-level BPE of {size} pieces on {source.name}")
    text = train_bpe(_sample(source, holdout_every), size)
    num_pieces = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    if num_pieces == MIN_SIZE:
        raise DataError(f"{source.name} has too little text to train tokenizer={spec} on")
    if num_pieces < size:
        logger.info(f"{source.name} is too small for {size} pieces: the tokenizer has {num_pieces}")
    try:
        _store(path, text)
    except OSError as error:  # a read-only home, a full disk
        logger.info(
            f"note       {path.parent} cannot be written ({error.strerror}); every new run will train its tokenizer"
        )
    return text


def _store(path: Path, text: str) -> None:
    """Write a file that is renamed when complete: readers see the whole file or none, and two writers do not disturb
    each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
        open(Path(folder, path.name), "w", encoding="utf-8") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)


def _sample(source: Source, holdout_every: int) -> Iterator[str]:
    """SAMPLE_CHARS of a corpus; of a mixture, of each source in proportion to its weight."""
    if not isinstance(source, Mixture):
        yield from _beginnings(source, holdout_every, SAMPLE_CHARS)
        return
    for name, share in source.shares().items():
        yield from _beginnings(source.parts[name].source, holdout_every, round(share * SAMPLE_CHARS))


def _beginnings(source: Source, holdout_every: int, num_chars: int) -> Iterator[str]:
    """The training documents at the beginning of the first shards, `num_chars` in all, equally many from each."""
    num_shards = min(source.num_shards, SAMPLE_SHARDS)
    for shard in range(num_shards):
        missing = num_chars // num_shards
        for document in source.documents(shard):
            if is_held_out(document.text, holdout_every):
                continue
            yield document.text[:missing]
            missing -= len(document.text)
            if missing <= 0:
                break
