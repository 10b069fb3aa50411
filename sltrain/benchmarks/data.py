"""Text to rows of ids: the training stream against tokenizing document by document, and against a GPU's appetite.

Throughput is in tokens that are not pads, a second of processor time. That counts every thread, so that neither a
background thread nor the tokenizer's own threads hide work: it is the rate of one core. A stream fills its queue while
others are timed; therefore each turn begins and ends when the process has come to rest.

The words that a stream has met make it faster, so it is timed after a warm-up, on text behind it. A corpus smaller
than the warm-up has been seen before, as it has in its training from the second epoch on.

The consumer takes a batch, is busy as long as a GPU would be with the update, and takes the next one. A GPU does 6 N
floating-point operations for each position, N being the model's parameters.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import tokenizers

from sltrain.benchmarks.table import Column, format_table, two_digits
from sltrain.benchmarks.timing import Say

ONE_BY_ONE = "document by document"
ROUNDS = 5
DOCUMENTS_PER_ROUND = 128  # of document by document
BATCHES_PER_ROUND = 4  # of a stream
WARM_UP_BATCHES = 16
# For streams whose throughput is measured: what they read and tokenize at a time is then little beside a round, so
# that rounds are alike. A document costs the same in any other shape.
NUM_STREAMS, SHUFFLE_BLOCK = 1, 256
GPU_FLOPS = 400e12 * 0.4  # a GPU of 400 TFLOP/s at 40 % utilisation
UPDATES = 24  # of the consumer, behind the first ones
WARM_UP_UPDATES = 4
BATCHES_AT_ONCE = 16  # taken by one that is never busy
REST_SECONDS = 0.02  # a process that does nothing for so long is at rest
MAX_REST_WAIT_SECONDS = 10.0


def document_by_document(texts: Iterable[str], tokenizer_json: str, seq_len: int, batch_size: int) -> Iterator[int]:
    """Tokenize one text a call, truncated to `seq_len` ids, into the rows of padded batches, as the published
    training code does. Yields the number of ids kept of each text."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_truncation(seq_len)
    tokenizer.no_padding()
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text).ids
        if number % batch_size == 0:
            batch = np.zeros((batch_size, seq_len), np.int64)
        batch[number % batch_size, : len(ids)] = ids
        yield len(ids)


def measure_throughput(
    one_by_one: Iterator[int],
    streams: Mapping[str, Iterator[int]],
    *,
    say: Say,
    rounds: int = ROUNDS,
    warm_up_batches: int = WARM_UP_BATCHES,
) -> list[dict[str, Any]]:
    """A row for tokenizing document by document and one for each stream, timed in turns: medians of `rounds`.

    `one_by_one` gives the tokens of each next document, a stream those of each next batch, without end. Streams may
    not share what they remember of words, and have NUM_STREAMS and SHUFFLE_BLOCK. `seconds` are for a million tokens.
    """
    for name, batches in streams.items():
        say(f"{name}: {warm_up_batches} batches to warm up")
        _take(batches, warm_up_batches)
    rates: dict[str, list[float]] = {ONE_BY_ONE: [], **{name: [] for name in streams}}
    for number in range(rounds):
        say(f"throughput, round {number + 1} of {rounds}")
        rates[ONE_BY_ONE].append(_rate(one_by_one, DOCUMENTS_PER_ROUND))
        for name, batches in streams.items():
            rates[name].append(_rate(batches, BATCHES_PER_ROUND))
    return [_throughput_row(name, rates[name], rates[ONE_BY_ONE]) for name in rates]


def measure_waiting(
    name: str,
    batches: Iterator[int],
    *,
    positions_per_batch: int,
    num_parameters: int,
    say: Say,
    gpu_flops: float = GPU_FLOPS,
    updates: int = UPDATES,
    warm_up_updates: int = WARM_UP_UPDATES,
) -> dict[str, Any]:
    """A row for a consumer: the fraction of time that it waits for `batches`, and how fast these come if it is never
    busy. `seconds` are those that it is busy with an update."""
    positions_per_second = gpu_flops / (6 * num_parameters)
    busy = positions_per_batch / positions_per_second
    say(f"{name}: {positions_per_second:,.0f} positions a second, {busy * (warm_up_updates + updates):.0f} s")
    waits, tokens = list[float](), list[int]()
    for _ in range(warm_up_updates + updates):
        start = time.perf_counter()
        tokens.append(next(batches))
        waits.append(time.perf_counter() - start)
        time.sleep(busy)
    waited = sum(waits[warm_up_updates:])
    seconds = waited + busy * updates
    _take(batches, warm_up_updates)  # those that were ready
    start = time.perf_counter()
    _take(batches, BATCHES_AT_ONCE)
    possible = positions_per_batch * BATCHES_AT_ONCE / (time.perf_counter() - start)
    return {
        "what": name,
        "seconds": busy,
        "tokens_per_second": sum(tokens[warm_up_updates:]) / seconds,
        "ratio_to_document_by_document": None,
        "positions_per_second": positions_per_batch * updates / seconds,
        "data_wait_fraction": waited / seconds,
        "longest_wait_seconds": max(waits[warm_up_updates:]),
        "possible_positions_per_second": possible,
    }


def data_table(rows: list[dict[str, Any]]) -> str:
    """The rows for people: throughput, then consumers."""
    throughput = [
        Column("what", "what"),
        Column("tokens_per_second", "tokens/s of one core", "{:,.0f}".format),
        Column("seconds", "s for 1M tokens", two_digits),
        Column("ratio_to_document_by_document", "over document by document", two_digits),
    ]
    consumers = [
        Column("what", "what"),
        Column("positions_per_second", "positions/s it gets", "{:,.0f}".format),
        Column("data_wait_fraction", "it waits", "{:.2%}".format),
        Column("possible_positions_per_second", "positions/s it could get", "{:,.0f}".format),
    ]
    parts = [
        ([row for row in rows if "data_wait_fraction" not in row], throughput),
        ([row for row in rows if "data_wait_fraction" in row], consumers),
    ]
    return "\n\n".join(format_table(group, columns) for group, columns in parts if group)


def _take(items: Iterator[int], count: int) -> int:
    return sum(islice(items, count))


def _rate(items: Iterator[int], count: int) -> float:
    """Tokens a second of processor time."""
    start = _cpu_seconds_at_rest()
    tokens = _take(items, count)
    return tokens / (_cpu_seconds_at_rest() - start)


def _cpu_seconds_at_rest() -> float:
    """The processor time of this process, read when no thread of it is at work."""
    deadline = time.monotonic() + MAX_REST_WAIT_SECONDS
    now = time.process_time()
    while True:
        last = now
        time.sleep(REST_SECONDS)
        now = time.process_time()
        if now - last < REST_SECONDS / 10 or time.monotonic() > deadline:
            return now


def _throughput_row(name: str, rates: list[float], reference: list[float]) -> dict[str, Any]:
    rate = statistics.median(rates)
    return {
        "what": name,
        "seconds": 1e6 / rate,
        "tokens_per_second": rate,
        "ratio_to_document_by_document": statistics.median(a / b for a, b in zip(rates, reference, strict=True)),
        "repeats": len(rates),
    }
