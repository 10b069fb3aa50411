"""A folder of token ids that `sltrain-tokenize` wrote: text is tokenized once, and training only reads ids.

    meta.json                 the format, the corpus, the tokenizer, counts, and size and SHA-256 of every other file
    tokenizer.json            what made the ids; tokenizer_config.json, which of its tokens end and pad texts
    train/00003-1.ids         ids of the documents of slice 1 of shard 3, one after the other: uint16 or uint32
    train/00003-1.documents   int64 (n, 2): a document's record index in its shard, and where its ids end in .ids
    validation/...            the same, and .bytes: uint32, the UTF-8 bytes of text that each id covers

All numbers are little-endian. Documents keep their record index and shards the sizes of the corpus, so order.py deals
and shuffles them as it does the text, and training gets the very rows that the text gives. Blocks of 1,024 records go
to the slices of a shard in turn, which lets several processes tokenize one large file. Ids are all that the tokenizer's
file has; a model with fewer maps them when they are read, as with text. validation/ holds the corpus's own validation
split, or the documents that train/ holds out.

Files are memory maps: reading starts at any document at once, and what several processes read is in memory once.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sltrain.data.documents import DataError, Document, Wanted
from sltrain.data.tokenizer import Tokenizer

META_FILE, TOKENIZER_FILE, UNFINISHED = "meta.json", "tokenizer.json", "unfinished"
FORMAT_VERSION = 1
BLOCK = 1024  # consecutive records of a shard that are in one slice
HASHED_AT_START = 1 << 30  # a folder of at most so many bytes is compared with its SHA-256 in less than a second
DOCUMENT_COLUMNS = 2


@dataclass
class Part:
    """What meta.json says of train/ or validation/."""

    shard_sizes: list[int]  # as the corpus gives them
    num_slices: int  # of every shard
    num_documents: int
    num_ids: int


@dataclass
class Meta:
    """The content of meta.json."""

    source: str  # name of the corpus
    source_fingerprint: str
    tokenizer_sha256: str  # of tokenizer.json
    tokenizer_ids: int  # how many it has; decides between uint16 and uint32
    eos_id: int  # the last id of every document
    holdout_every: int  # one document in so many is in validation/; 0: that is a corpus of its own
    train: Part
    validation: Part
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # relative path -> bytes, sha256
    format_version: int = FORMAT_VERSION

    @property
    def dtype(self) -> np.dtype[Any]:
        return id_dtype(self.tokenizer_ids)


@dataclass(slots=True)
class TokenizedDocument(Document):
    """A document whose ids are known; its `text` is empty."""

    ids: NDArray[Any]  # (n,) uint16 or uint32
    num_bytes: NDArray[np.uint32] | None  # (n,) that each id covers; None in train/


class TokenFiles:
    """The documents of one part of a folder, as a source (data/documents.py).

    Raises ValueError if `folder` is no finished folder of tokens.
    """

    def __init__(self, folder: Path, part: str = "train") -> None:
        self.folder, self.part_name = folder, part
        self.meta = read_meta(folder)
        self.part: Part = getattr(self.meta, part)
        self.name = str(folder)
        self.num_shards = len(self.part.shard_sizes)
        self._is_checked = False

    def fingerprint(self) -> str:
        """Counts, and a hash of all files, which meta.json holds."""
        content = {key: value for key, value in asdict(self.meta).items() if key != "source"}  # which may move
        digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        return f"{self.part.num_documents:,} documents, {self.part.num_ids:,} ids, {digest}"

    def shard_sizes(self) -> list[int]:
        return self.part.shard_sizes

    def check(self) -> None:
        """Raise DataError if a file is missing or has another size; or another SHA-256, unless the folder is large."""
        if not self._is_checked:
            is_small = sum(file["bytes"] for file in self.meta.files.values()) <= HASHED_AT_START
            verify(self.folder, self.meta, hashes=is_small)
            self._is_checked = True

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if the ids are not those of this tokenizer."""
        digest = sha256(tokenizer.json.encode()).hexdigest()
        if (digest, tokenizer.eos_id) != (self.meta.tokenizer_sha256, self.meta.eos_id):
            raise ValueError(
                f"{self.folder} was not made with this tokenizer; leave tokenizer out, which takes "
                f"{self.folder / TOKENIZER_FILE}, or tokenize the text again with the other one"
            )

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[TokenizedDocument]:
        slices = [self._open(shard, number) for number in range(self.part.num_slices)]
        places = [int(np.searchsorted(piece.documents[:, 0], start)) for piece in slices]
        while True:
            heads = [
                (int(piece.documents[place, 0]), number)
                for number, (piece, place) in enumerate(zip(slices, places, strict=True))
                if place < len(piece.documents)
            ]
            if not heads:
                return
            index, number = min(heads)
            first, piece = places[number], slices[number]
            after_block = (index // BLOCK + 1) * BLOCK
            places[number] = first + int(np.searchsorted(piece.documents[first : first + BLOCK, 0], after_block))
            for document in piece.read(first, places[number]):
                if wanted is None or wanted(document.index):
                    yield document

    def _open(self, shard: int, number: int) -> "_Slice":
        stem = self.folder / self.part_name / slice_name(shard, number)
        sizes = _map(stem.with_suffix(".bytes"), np.dtype("<u4")) if self.part_name == "validation" else None
        documents = _map(stem.with_suffix(".documents"), np.dtype("<i8")).reshape(-1, DOCUMENT_COLUMNS)
        return _Slice(documents, _map(stem.with_suffix(".ids"), self.meta.dtype), sizes)


@dataclass
class _Slice:
    documents: NDArray[np.int64]  # (n, 2)
    ids: NDArray[Any]
    num_bytes: NDArray[np.uint32] | None

    def read(self, first: int, last: int) -> Iterator[TokenizedDocument]:
        """Documents first .. last - 1 of the slice."""
        begin = int(self.documents[first - 1, 1]) if first else 0
        for index, end in self.documents[first:last].tolist():
            sizes = None if self.num_bytes is None else self.num_bytes[begin:end]
            yield TokenizedDocument(index, "", self.ids[begin:end], sizes)
            begin = end


def ids_of(documents: list[Document], tokenizer: Tokenizer, max_len: int | None = None) -> list[NDArray[np.int32]]:
    """The ids of each document as `Tokenizer.encode_batch` gives them, tokenized here unless that has been done."""
    if not any(isinstance(document, TokenizedDocument) for document in documents):
        return tokenizer.encode_batch([document.text for document in documents], max_len)
    return [tokenizer.refit(document.ids, max_len) for document in map(_tokenized, documents)]


def ids_with_bytes_of(
    documents: list[Document], tokenizer: Tokenizer, max_len: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """As `Tokenizer.encode_with_bytes`, for documents of either kind."""
    if not any(isinstance(document, TokenizedDocument) for document in documents):
        return tokenizer.encode_with_bytes([document.text for document in documents], max_len)
    found = []
    for document in map(_tokenized, documents):
        assert document.num_bytes is not None, "documents of a training part have no bytes"
        ids = tokenizer.refit(document.ids, max_len).tolist()
        sizes = document.num_bytes[: len(ids)].tolist()
        found.append((ids, sizes if len(ids) == len(document.ids) else [*sizes[:-1], 0]))
    return found


def _tokenized(document: Document) -> TokenizedDocument:
    assert isinstance(document, TokenizedDocument), "a source gives documents of one kind"
    return document


def read_meta(folder: Path) -> Meta:
    """meta.json of a finished folder. Raises ValueError for anything else."""
    path = folder / META_FILE
    if not path.is_file():
        if not folder.exists():
            raise ValueError(f"{folder} does not exist; name a folder that sltrain-tokenize made")
        if (folder / UNFINISHED).is_dir():
            raise ValueError(f"{folder} is not finished; start the same sltrain-tokenize again, which continues it")
        raise ValueError(f"{folder} is no folder of tokens: it has no {META_FILE}; name one that sltrain-tokenize made")
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return Meta(**{**content, **{name: Part(**content[name]) for name in ("train", "validation")}})
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); make the folder again with sltrain-tokenize") from None
    raise ValueError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}; tokenize again")


def verify(folder: Path, meta: Meta, hashes: bool) -> None:
    """Raise DataError for a file that is missing or has another size or, with `hashes`, another SHA-256 than meta.json
    says."""
    for name, said in meta.files.items():
        path = folder / name
        try:
            size = os.path.getsize(path)
            if size != said["bytes"]:
                what = f"it has {size:,} bytes instead of {said['bytes']:,}"
            elif hashes and file_sha256(path) != said["sha256"]:
                what = "its content does not match its SHA-256"
            else:
                continue
        except OSError as error:
            what = str(error.strerror)
        raise DataError(f"{path} is damaged: {what}; copy it from where it is intact, or tokenize into another folder")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def id_dtype(num_ids: int) -> np.dtype[Any]:
    """The type that holds ids below `num_ids` on the disk."""
    return np.dtype("<u2" if num_ids <= 1 << 16 else "<u4")


def slice_name(shard: int, number: int) -> str:
    """The stem of a slice's files."""
    return f"{shard:05d}-{number}"


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers of a file, read when they are used. Raises DataError if it is gone."""
    try:
        if os.path.getsize(path) == 0:  # which no system maps
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; the folder must stay in place") from None
