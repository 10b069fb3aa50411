"""Text to rows of ids: the training stream against tokenizing document by document, and against a GPU's demand.

Throughput is tokens other than pads per second of processor time, which counts every thread of the process, the
tokenizer's and background ones: it is the rate of one core. A stream fills its queue while others are timed, so each
turn starts and ends with the process at rest. A stream gets faster with the words it has met and is therefore timed
after a warm-up; a corpus smaller than the warm-up has been seen before, as in training from the second epoch on.

The consumer takes a batch, is busy for as long as a GPU would be with the update, and takes the next one. A GPU does
6 P floating-point operations for each position, with P the model's parameters.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers

from sltrain.benchmarks.base import SEED, Bench, Column, Result, Row, format_table, vocab_size
from sltrain.benchmarks.timing import Task, in_turns
from sltrain.building.data import build_tokenizer
from sltrain.building.model import build_model
from sltrain.data.documents import Source
from sltrain.data.rows import PADDINGS
from sltrain.data.stream import TrainStream
from sltrain.data.token_folder import TokenFiles
from sltrain.engine.distributed import Ranks
from sltrain.planning.accounting import count_parameters

logger = logging.getLogger(__name__)

ONE_BY_ONE = "document by document"
ROUNDS, DOCUMENTS_PER_ROUND, BATCHES_PER_ROUND, WARM_UP_BATCHES = 5, 128, 4, 16
# Throughput streams read and tokenize little at a time, so that rounds are alike; the cost of a document is the same.
NUM_STREAMS, SHUFFLE_BLOCK = 1, 256
GPU_FLOPS = 400e12 * 0.4  # a GPU of 400 TFLOP/s at 40 % utilisation
UPDATES, WARM_UP_UPDATES = 24, 4  # of the consumer
REST_SECONDS, MAX_REST_WAIT_SECONDS = 0.02, 10.0  # a process idle for so long is at rest


def measure_data(bench: Bench) -> Result:
    """Rows of throughput, and of how long a GPU would wait. Raises ValueError or OSError for text or a tokenizer that
    cannot be read."""
    overrides = [f"tokenizer={json.dumps(bench.config.tokenizer, ensure_ascii=False)}"]  # quoted as Hydra wants it
    if bench.config.path:
        overrides += ["data=local", f"path={json.dumps(bench.config.path, ensure_ascii=False)}"]
    train = bench.train_config(*overrides)
    source, ranks = train.data.open_training(), Ranks(rank=0, world_size=1, device=bench.device)
    new_tokenizer = partial(build_tokenizer, train, source, ranks)  # each has a word cache of its own
    with ExitStack() as opened:
        events = logging.getLogger(TrainStream.__module__)
        opened.callback(events.setLevel, events.level)
        events.setLevel(logging.WARNING)  # a small corpus starts over many times

        def stream(padding: str, num_streams: int, shuffle_block: int, of: Source = source) -> Iterator[int]:
            """Tokens of each batch of a training stream."""
            new = TrainStream(
                of,
                new_tokenizer(),
                seed=SEED,
                seq_len=train.seq_len,
                padding=padding,
                global_batch_size=train.global_batch_size,
                num_streams=num_streams,
                shuffle_block=shuffle_block,
                prefetch=2,
            )
            opened.enter_context(closing(new))
            return (batch.num_tokens for batch in new)

        texts = document_by_document(source, new_tokenizer().json, train.seq_len, train.global_batch_size)
        small = {f"stream, {padding}": stream(padding, NUM_STREAMS, SHUFFLE_BLOCK) for padding in PADDINGS}
        if bench.config.prepared:
            prepared = TokenFiles(Path(bench.config.prepared).expanduser())
            prepared.check_tokenizer(new_tokenizer())
            small |= {
                f"prepared, {padding}": stream(padding, NUM_STREAMS, SHUFFLE_BLOCK, prepared) for padding in PADDINGS
            }
        rows = measure_throughput(bench, texts, small)
        positions = train.global_batch_size * train.seq_len
        num_parameters = count_parameters(build_model(train, vocab_size(train), bench.dtype))["total"]
        for padding in PADDINGS:
            name = f"training of {train.model.name}, {padding}"
            batches = stream(padding, train.data.num_streams, train.data.shuffle_block)
            row = measure_waiting(batches, busy=positions * 6 * num_parameters / GPU_FLOPS)
            rows.append({"measured": name, **row, "positions_per_second": positions * row["updates_per_second"]})
    tables = (format_table([row for row in rows if columns[1][0] in row], columns) for columns in (RATES, WAITS))
    return rows, "\n\n".join(tables)


def document_by_document(source: Source, tokenizer_json: str, seq_len: int, batch_size: int) -> Iterator[int]:
    """Tokenize the texts of a corpus one by one, without end, truncated to `seq_len` ids, into rows of padded batches,
    as the published training code does. Yields the number of ids of each row."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_truncation(seq_len)
    tokenizer.no_padding()
    shards = itertools.cycle(range(source.num_shards))
    documents = itertools.chain.from_iterable(map(source.documents, shards))
    for number, document in enumerate(documents):
        ids = tokenizer.encode(document.text).ids
        if number % batch_size == 0:
            batch = np.zeros((batch_size, seq_len), np.int64)
        batch[number % batch_size, : len(ids)] = ids
        yield len(ids)


def measure_throughput(bench: Bench, texts: Iterator[int], streams: dict[str, Iterator[int]]) -> list[Row]:
    """A row for tokenizing document by document and one for each stream, timed in turns. Each iterator yields the
    tokens of its next document or batch, without end. `seconds` are for a million tokens."""
    for name, batches in streams.items():
        logger.info(f"{name}: {WARM_UP_BATCHES} batches to warm up")
        _take(batches, WARM_UP_BATCHES)()
    tasks = {ONE_BY_ONE: Task(_take(texts, DOCUMENTS_PER_ROUND))}
    tasks |= {name: Task(_take(batches, BATCHES_PER_ROUND)) for name, batches in streams.items()}
    rounds = bench.config.repeats or ROUNDS
    timings = in_turns(tasks, repeats=rounds, deadline=0, clock=_cpu_seconds_at_rest)
    return [
        {
            "measured": name,
            "seconds": 1e6 * timing.median,
            "ratio_to_dense": None,
            "tokens_per_second": 1 / timing.median,
            "ratio_to_document_by_document": timings[ONE_BY_ONE].median / timing.median,
            "repeats": rounds,
        }
        for name, timing in timings.items()
    ]


def measure_waiting(batches: Iterator[int], busy: float) -> Row:
    """The row of a consumer that is busy for `busy` seconds with each of `batches`: its speed, and the fraction of
    time that it waits."""
    waits, tokens = list[float](), list[int]()
    for _ in range(WARM_UP_UPDATES + UPDATES):
        start = time.perf_counter()
        tokens.append(next(batches))
        waits.append(time.perf_counter() - start)
        time.sleep(busy)
    waited = sum(waits[WARM_UP_UPDATES:])
    seconds = waited + busy * UPDATES
    return {
        "seconds": busy,
        "ratio_to_dense": None,
        "tokens_per_second": sum(tokens[WARM_UP_UPDATES:]) / seconds,
        "updates_per_second": UPDATES / seconds,
        "data_wait_fraction": waited / seconds,
        "longest_wait_seconds": max(waits[WARM_UP_UPDATES:]),
    }


RATES: list[Column] = [
    ("measured", "measured", ""),
    ("ratio_to_document_by_document", "over document by document", ".2f"),
    ("tokens_per_second", "tokens/s of one core", ",.0f"),
    ("seconds", "s for 1M tokens", ".2f"),
]
WAITS: list[Column] = [
    ("measured", "measured", ""),
    ("data_wait_fraction", "it waits", ".2%"),
    ("positions_per_second", "positions/s it gets", ",.0f"),
]


def _take(items: Iterator[int], count: int) -> Callable[[], int]:
    return lambda: sum(itertools.islice(items, count))


def _cpu_seconds_at_rest() -> float:
    """The processor time of this process, read once all its threads are idle."""
    deadline = time.monotonic() + MAX_REST_WAIT_SECONDS
    now = time.process_time()
    while True:
        last = now
        time.sleep(REST_SECONDS)
        now = time.process_time()
        if now - last < REST_SECONDS / 10 or time.monotonic() > deadline:
            return now
