"""A corpus -> a folder of token ids (data/token_folder.py), by several processes at once.

the plan      which corpus, tokenizer and slices; in unfinished/plan.json, so that a later call continues the same
the work      a process a slice at a time (tokenize_slice.py)
meta.json     written when every slice is complete; unfinished/ is then deleted
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from sltrain.api.tokenize_config import TokenizeConfig
from sltrain.api.tokenize_slice import Job, Slice, Worker, open_validation, read_state, start_worker, tokenize_in_worker
from sltrain.building.data import build_sources, build_tokenizer
from sltrain.config import TrainConfig
from sltrain.data.documents import DataError, Source
from sltrain.data.special_tokens import CONFIG_FILE
from sltrain.data.token_folder import META_FILE, TOKENIZER_FILE, UNFINISHED, Meta, Part, file_sha256, read_meta, verify
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.engine.sealed_folder import write_atomically
from sltrain.runs.lock import RunLock, RunLocked

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Plan:
    """What decides the content of a folder; equal plans continue each other."""

    source_fingerprint: str
    validation_fingerprint: str | None  # None: held-out documents
    tokenizer_sha256: str
    eos_id: int
    holdout_every: int
    num_slices: dict[str, int]  # part -> slices of each of its shards


def tokenize(settings: TokenizeConfig, config: TrainConfig) -> Path:
    """Make the folder settings.output of the text of `config`, or continue it; one that is finished is only checked.
    Returns its path. Raises ValueError or OSError for what the user can fix; what is done by then is kept."""
    folder = Path(settings.output).expanduser()
    if folder.is_dir() and (folder / META_FILE).exists():
        return _check_finished(folder, config)
    if folder.exists() and not (folder / UNFINISHED).is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={folder} holds something else; name a new folder")
    ranks = Ranks(0, 1, torch.device("cpu"))
    source, validation = build_sources(config)
    for corpus in (source, validation):
        if corpus is not None:
            corpus.check()
    config = replace(config, model=replace(config.model, vocab_size=None))  # all ids that the tokenizer has
    tokenizer = build_tokenizer(config, source, ranks)
    processes = settings.processes or len(os.sched_getaffinity(0))
    plan = _plan(config, source, validation, tokenizer, processes)
    lock = _lock(folder)
    try:
        plan = _begin(folder, plan, tokenizer)
        job = _job(folder, config, validation is None, tokenizer)
        slices = [
            Slice(part, shard, number, plan.num_slices[part])
            for part, corpus in (("train", source), ("validation", validation))
            for shard in range(corpus.num_shards if corpus else 0)
            for number in range(plan.num_slices[part])
        ]
        at_once = min(processes, len(slices))
        logger.info(
            f"tokenizing {source.name}, {source.num_shards} shard{'s' * (source.num_shards != 1)}, in {at_once}"
            f" process{'es' * (at_once != 1)}; tokenizer {config.tokenizer}, vocabulary {tokenizer.vocab_size:,}"
        )
        _run(job, slices, processes)
        meta = _meta(folder, plan, source, validation, tokenizer, slices)
        write_atomically(folder / META_FILE, json.dumps(asdict(meta), indent=1))
        shutil.rmtree(folder / UNFINISHED)
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
    logger.info(
        f"done       {meta.train.num_documents:,} documents, {meta.train.num_ids:,} ids; validation "
        f"{meta.validation.num_documents:,} documents, {meta.validation.num_ids:,} ids\n"
        f"           sltrain-train data=tokens path={folder} ..."
    )
    return folder


def _check_finished(folder: Path, config: TrainConfig) -> Path:
    meta = read_meta(folder)
    source = config.data.open_training()
    if meta.source_fingerprint != source.fingerprint():
        raise ValueError(
            f"output={folder} holds the ids of {meta.source} ({meta.source_fingerprint}), not of {source.name} "
            f"({source.fingerprint()}); name another folder"
        )
    verify(folder, meta, hashes=True)
    logger.info(f"{folder} is finished, and all its files match their SHA-256; nothing to do")
    return folder


def _plan(config: TrainConfig, source: Source, validation: Source | None, tokenizer: Tokenizer, processes: int) -> Plan:
    return Plan(
        source.fingerprint(),
        None if validation is None else validation.fingerprint(),
        sha256(tokenizer.json.encode()).hexdigest(),
        tokenizer.eos_id,
        config.data.holdout_every if validation is None else 0,
        {
            part: -(-processes // corpus.num_shards)
            for part, corpus in (("train", source), ("validation", validation))
            if corpus is not None
        },
    )


def _lock(folder: Path) -> RunLock:
    try:
        return RunLock(folder)
    except RunLocked:
        raise ValueError(f"another sltrain-tokenize is writing output={folder}; wait for it, or name another") from None


def _begin(folder: Path, plan: Plan, tokenizer: Tokenizer) -> Plan:
    """Make the folder, or check that what is begun there has this plan; its slices stay as they are. Returns the
    plan."""
    file = folder / UNFINISHED / "plan.json"
    if file.exists():
        begun = Plan(**json.loads(file.read_text()))
        for key, old in asdict(begun).items():
            new = getattr(plan, key)
            if key != "num_slices" and old != new:
                raise ValueError(
                    f"output={folder} was begun with another {key.replace('_', ' ')}: {old}, now it is {new}; "
                    "type what it was begun with, or name another folder"
                )
        logger.info(f"continuing {folder}")
        return begun
    for name in ("train", "validation", UNFINISHED):
        (folder / name).mkdir(exist_ok=True)
    write_atomically(folder / TOKENIZER_FILE, tokenizer.json)
    write_atomically(folder / CONFIG_FILE, json.dumps(tokenizer.settings(), indent=2) + "\n")
    write_atomically(file, json.dumps(asdict(plan), indent=1))
    return plan


def _job(folder: Path, config: TrainConfig, holds_out: bool, tokenizer: Tokenizer) -> Job:
    return Job(
        folder,
        {"train": config.data.open_training, "validation": partial(open_validation, config)},
        partial(
            Tokenizer,
            tokenizer.json,
            config.tokenizer,
            settings=tokenizer.settings(),
            on_bad_data=config.on_bad_data,
        ),
        tokenizer.vocab_size,
        config.data.holdout_every if holds_out else 0,
    )


def _run(job: Job, slices: list[Slice], processes: int) -> None:
    """Tokenize all slices. Raises what a process raises, once the others have stopped."""
    left = [work for work in slices if not read_state(job.folder, work).is_complete]
    progress = _Progress(job.folder, slices)
    if processes == 1:
        worker = Worker(job, should_stop=lambda: progress.tell())
        for work in left:
            worker.tokenize(work)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(min(processes, len(left) or 1), context, start_worker, (job, stop)) as pool:
        try:
            own_signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is not for the processes
            try:
                futures = {pool.submit(tokenize_in_worker, work) for work in left}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, own_signals)
            _follow(futures, progress)
        except BrokenProcessPool:
            raise ValueError(
                "a process was killed, by lack of memory perhaps; the same command continues (processes=1 needs least)"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _follow(futures: set[Future[bool]], progress: "_Progress") -> None:
    while futures:
        done, futures = wait(futures, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        progress.tell()


class _Progress:
    """Says from time to time how far the slices are."""

    def __init__(self, folder: Path, slices: list[Slice]) -> None:
        self.folder, self.slices = folder, slices
        self.num_complete, self.num_ids = self._read()
        self.told_at, self.begun_at, self.begun_ids = time.monotonic(), time.monotonic(), self.num_ids

    def tell(self) -> bool:
        """Log a line, unless the last one is new. False."""
        now = time.monotonic()
        if now - self.told_at >= SECONDS_BETWEEN_LINES:
            self.told_at = now
            self.num_complete, self.num_ids = self._read()
            rate = (self.num_ids - self.begun_ids) / (now - self.begun_at)
            logger.info(
                f"           {self.num_complete} of {len(self.slices)} slices complete, {self.num_ids:,} ids, "
                f"{rate:,.0f} ids/s"
            )
        return False

    def _read(self) -> tuple[int, int]:
        states = [read_state(self.folder, work) for work in self.slices]
        num_ids = sum(part.ids for state in states for part in state.parts.values())
        return sum(state.is_complete for state in states), num_ids


def _meta(
    folder: Path,
    plan: Plan,
    source: Source,
    validation: Source | None,
    tokenizer: Tokenizer,
    slices: list[Slice],
) -> Meta:
    """What is known once all slices are complete."""
    files: dict[str, dict[str, Any]] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in (TOKENIZER_FILE, CONFIG_FILE)
    }
    shards = {"train": source, "validation": validation or source}
    slices_of = {"train": plan.num_slices["train"], "validation": plan.num_slices.get("validation")}
    parts = {
        name: Part(corpus.shard_sizes(), slices_of[name] or plan.num_slices["train"], 0, 0)
        for name, corpus in shards.items()
    }
    for work in slices:
        for name, written in read_state(folder, work).parts.items():
            parts[name].num_documents += written.documents
            parts[name].num_ids += written.ids
            files.update(written.files)
    if not parts["train"].num_documents:
        raise DataError(f"no documents in {source.name}; nothing to train on")
    return Meta(
        source.name,
        plan.source_fingerprint,
        plan.tokenizer_sha256,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        plan.holdout_every,
        parts["train"],
        parts["validation"],
        files,
    )
