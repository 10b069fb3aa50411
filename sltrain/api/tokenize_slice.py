"""One slice of one shard of a corpus -> its files in a folder of tokens (data/token_folder.py). Several run at once, in
processes of their own, and each goes on where a killed one stopped.

Files only grow. After some documents they are flushed to the disk, and their lengths and the next record index are
written to a small state file: what follows these lengths is cut off by the next process that continues the slice.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import numpy as np

from sltrain.config import TrainConfig
from sltrain.data.documents import Document, Source, is_held_out
from sltrain.data.logical_stream import DOCUMENTS_PER_CALL
from sltrain.data.token_folder import BLOCK, UNFINISHED, file_sha256, id_dtype, slice_name
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.sealed_folder import write_atomically
from sltrain.log import PACKAGE, LineHandler

SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True)
class Slice:
    """Every num_slices-th block of BLOCK records of a shard."""

    part: str  # train or validation: the corpus that is read
    shard: int
    number: int
    num_slices: int


@dataclass(frozen=True)
class Job:
    """What all slices share; sent to each process."""

    folder: Path
    sources: dict[str, Callable[[], Source]]  # part -> opens its corpus
    new_tokenizer: Callable[[], Tokenizer]
    tokenizer_ids: int
    holdout_every: int  # one training document in so many goes to validation/; 0: none


@dataclass
class Written:
    """Lengths of one slice's files in train/ or validation/."""

    documents: int = 0
    ids: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # relative path -> bytes, sha256; when complete


@dataclass
class State:
    """How far a slice is. The lengths are those of each part it writes."""

    next_record: int = 0
    is_complete: bool = False
    parts: dict[str, Written] = field(default_factory=dict)


def state_file(folder: Path, work: Slice) -> Path:
    """Where the state of a slice is kept until the folder is finished."""
    return folder / UNFINISHED / f"{work.part}-{slice_name(work.shard, work.number)}.json"


def read_state(folder: Path, work: Slice) -> State:
    """The state of a slice; that of a new one if there is none."""
    try:
        content = json.loads(state_file(folder, work).read_text())
    except FileNotFoundError:
        return State()
    return State(**{**content, "parts": {name: Written(**part) for name, part in content["parts"].items()}})


class Worker:
    """Tokenizes slices. Opens a corpus and the tokenizer once, when they are first needed."""

    def __init__(self, job: Job, should_stop: Callable[[], bool]) -> None:
        self.job, self._should_stop = job, should_stop
        self._sources: dict[str, Source] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.job.new_tokenizer()

    def tokenize(self, work: Slice) -> bool:
        """Tokenize what is left of a slice; False if the work has to stop. Raises what the corpus raises; what was read
        before that is kept."""
        folder, holdout_every = self.job.folder, self.job.holdout_every if work.part == "train" else 0
        names = ["train", "validation"] if holdout_every else [work.part]
        stem = slice_name(work.shard, work.number)
        with ExitStack() as opened:
            writers = {name: PartWriter(folder / name / stem, self.job.tokenizer_ids, name) for name in names}
            for writer in writers.values():
                opened.enter_context(writer)  # waits for a process that still writes here
            state = read_state(folder, work)
            if state.is_complete:
                return True
            for name, writer in writers.items():
                writer.cut_to(state.parts.setdefault(name, Written()))
            if not self._read_to_end(work, state, writers):
                return False
            for name, writer in writers.items():
                state.parts[name].files = writer.entries(folder)
            state.is_complete = True
            _save(folder, work, state, writers)
        return True

    def _read_to_end(self, work: Slice, state: State, writers: dict[str, "PartWriter"]) -> bool:
        """Append the documents from state.next_record on; False if the work has to stop. Saves the state."""
        saved = time.monotonic()
        try:
            for documents in self._groups(work, state.next_record):
                self._write(documents, writers)
                parts = {name: copy(writer.written) for name, writer in writers.items()}
                # Together: an interrupt between them would leave out documents, as the state is saved all the same.
                state.next_record, state.parts = documents[-1].index + 1, parts
                if self._should_stop():
                    return False
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    _save(self.job.folder, work, state, writers)
                    saved = time.monotonic()
            return True
        finally:
            _save(self.job.folder, work, state, writers)

    def _groups(self, work: Slice, start: int) -> Iterator[list[Document]]:
        """The documents of a slice from record `start` on, some at a time."""
        if work.part not in self._sources:
            self._sources[work.part] = self.job.sources[work.part]()
        wanted = None if work.num_slices == 1 else partial(_is_in_slice, work)
        documents = self._sources[work.part].documents(work.shard, start, wanted)
        while group := list(islice(documents, DOCUMENTS_PER_CALL)):
            yield group

    def _write(self, documents: list[Document], writers: dict[str, "PartWriter"]) -> None:
        """Tokenize each document and append it to the part it belongs to."""
        for name, writer in writers.items():
            is_validation, own = name == "validation", documents
            if len(writers) > 1:
                own = [d for d in documents if is_held_out(d.text, self.job.holdout_every) == is_validation]
            texts = [document.text for document in own]
            if is_validation:
                for document, (ids, sizes) in zip(own, self.tokenizer.encode_with_bytes(texts), strict=True):
                    writer.append(document.index, np.array(ids, np.int64), sizes)
            else:
                for document, packed in zip(own, self.tokenizer.encode_batch(texts), strict=True):
                    writer.append(document.index, packed)


_worker: Worker | None = None  # of this process


def start_worker(job: Job, stop: Event) -> None:
    """Prepare a process of a pool: it reports nothing but warnings and what it raises."""
    global _worker
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one of many
    PACKAGE.addHandler(LineHandler("stderr"))
    PACKAGE.propagate = False
    _worker = Worker(job, stop.is_set)


def _end_with_parent() -> None:
    """End this process when the command has died: without this it would wait for work for ever. What it has written
    since the last state file is cut off by the process that continues."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def tokenize_in_worker(work: Slice) -> bool:
    """`Worker.tokenize` in a process of the pool."""
    assert _worker is not None
    return _worker.tokenize(work)


def open_validation(config: TrainConfig) -> Source:
    """The validation corpus of a configuration that has one."""
    from sltrain.building.data import build_validation_source  # with it torch, which no other slice needs

    source = build_validation_source(config)
    assert source is not None
    return source


def _is_in_slice(work: Slice, index: int) -> bool:
    return index // BLOCK % work.num_slices == work.number


def _save(folder: Path, work: Slice, state: State, writers: dict[str, "PartWriter"]) -> None:
    """Force the files to the disk, then the state."""
    for writer in writers.values():
        writer.flush()
    write_atomically(state_file(folder, work), json.dumps(asdict(state)))


class PartWriter:
    """The files of one slice in train/ or validation/, growing; locked while they are open."""

    def __init__(self, stem: Path, num_ids: int, part: str) -> None:
        self.stem, self.dtype = stem, id_dtype(num_ids)
        self.suffixes = [".ids", ".documents", *([".bytes"] if part == "validation" else [])]

    def __enter__(self) -> "PartWriter":
        self._files: dict[str, BinaryIO] = {}
        for suffix in self.suffixes:
            self._files[suffix] = open(self.stem.with_suffix(suffix), "ab")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._files[".ids"], fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def cut_to(self, written: Written) -> None:
        """Go on after what was saved."""
        self.written = Written(written.documents, written.ids)
        lengths = {".ids": written.ids * self.dtype.itemsize, ".documents": written.documents * 16}
        for suffix, file in self._files.items():
            file.truncate(lengths.get(suffix, written.ids * 4))

    def append(self, index: int, ids: np.ndarray, sizes: list[int] | None = None) -> None:
        """Add a document: its record index, all its ids and, in validation/, the bytes that each covers."""
        self.written.documents += 1
        self.written.ids += len(ids)
        self._files[".ids"].write(ids.astype(self.dtype).tobytes())
        self._files[".documents"].write(np.array([index, self.written.ids], "<i8").tobytes())
        if sizes is not None:
            self._files[".bytes"].write(np.array(sizes, "<u4").tobytes())

    def flush(self) -> None:
        """Force everything to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def entries(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of each file, by its path inside the folder."""
        paths = [self.stem.with_suffix(suffix) for suffix in self.suffixes]
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in paths
        }
