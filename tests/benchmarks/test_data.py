"""The data benchmark's own arithmetic, on work whose size is known."""

import itertools
import json
import time
from collections.abc import Iterator

import pytest
import tokenizers

from sltrain.benchmarks.data import ONE_BY_ONE, data_table, document_by_document, measure_throughput, measure_waiting


def work(units: int, tokens: int) -> Iterator[int]:
    """An endless stream that counts `tokens` for `units` of work, which takes processor time."""
    while True:
        for _ in range(units):
            sum(range(20_000))
        yield tokens


def test_ratios_follow_the_processor_time_of_a_token() -> None:
    streams = {"half the work": work(40, 80), "the same work": work(40, 40)}
    lines: list[str] = []
    rows = measure_throughput(work(1, 1), streams, say=lines.append, rounds=3, warm_up_batches=1)
    assert [row["what"] for row in rows] == [ONE_BY_ONE, *streams]
    one, half, same = (row["ratio_to_document_by_document"] for row in rows)
    assert one == 1 and 1.3 < half < 3 and 0.6 < same < 1.6
    for row in rows:
        assert row["seconds"] * row["tokens_per_second"] == pytest.approx(1e6)
        json.dumps(row)
    assert lines and all(row["what"] in data_table(rows) for row in rows)


def test_a_consumer_waits_for_a_stream_that_is_slower_than_it() -> None:
    def slow(seconds: float) -> Iterator[int]:
        while True:
            time.sleep(seconds)
            yield 90

    shape = {"positions_per_batch": 100, "num_parameters": 1000, "gpu_flops": 6 * 1000 * 100 / 0.02, "updates": 5}
    row = measure_waiting("slow", slow(0.02), **shape, warm_up_updates=1, say=lambda line: None)
    assert row["seconds"] == pytest.approx(0.02)  # 100 positions at 5,000 a second
    assert 0.3 < row["data_wait_fraction"] < 0.8 and row["longest_wait_seconds"] >= 0.02
    assert row["tokens_per_second"] == pytest.approx(0.9 * row["positions_per_second"])
    assert row["possible_positions_per_second"] <= 5000 and row["positions_per_second"] < 2500
    row = measure_waiting("fast", itertools.repeat(90), **shape, warm_up_updates=1, say=lambda line: None)
    assert row["data_wait_fraction"] < 0.05 and "fast" in data_table([row])


def test_document_by_document_is_the_library_a_text_at_a_time() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    texts = ["a b", "a b a b a b", "", "b"]
    assert list(document_by_document(texts, tokenizer.to_str(), seq_len=4, batch_size=3)) == [2, 4, 0, 1]
