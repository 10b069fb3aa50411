"""The data benchmark's own arithmetic, on work whose size is known."""

import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import tokenizers

from sltrain.benchmarks import data


def stream(clock: Any, seconds: float, tokens: int, by_others: float = 0) -> Iterator[int]:
    """An endless stream that counts `tokens` for so many seconds of work, and of another thread's work."""
    while True:
        clock.work(seconds)
        clock.others += by_others
        yield tokens


def test_ratios_follow_the_processor_time_of_a_token(clock_of: Callable[[ModuleType], Any]) -> None:
    clock = clock_of(data)
    streams = {
        "half the work": stream(clock, 2.0, 80),
        "the same work": stream(clock, 2.0, 40),
        "in the background": stream(clock, 0.0, 5, by_others=0.5),
    }
    lines: list[str] = []
    one_by_one = stream(clock, 0.05, 1)
    rows = data.measure_throughput(one_by_one, streams, say=lines.append, rounds=3, warm_up_batches=1)
    assert [row["what"] for row in rows] == [data.ONE_BY_ONE, *streams]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([20, 40, 20, 10])
    assert [row["ratio_to_document_by_document"] for row in rows] == pytest.approx([1, 2, 1, 0.5])
    for row in rows:
        assert row["seconds"] * row["tokens_per_second"] == pytest.approx(1e6)
        json.dumps(row)
    assert lines and all(row["what"] in data.data_table(rows) for row in rows)


def test_a_process_that_never_rests_is_waited_for_no_longer(clock_of: Callable[[ModuleType], Any]) -> None:
    clock = clock_of(data)
    clock.others = 1e9
    data.measure_throughput(stream(clock, 0, 1), {}, say=lambda line: None, rounds=1)
    assert clock.now == pytest.approx(2 * data.MAX_REST_WAIT_SECONDS, abs=3 * data.REST_SECONDS)


def test_a_consumer_waits_for_a_stream_that_is_slower_than_it(clock_of: Callable[[ModuleType], Any]) -> None:
    clock = clock_of(data)
    shape = {"positions_per_batch": 100, "num_parameters": 1000, "gpu_flops": 6 * 1000 * 100 / 0.02, "updates": 5}
    slow, fast = stream(clock, 0.06, 90), stream(clock, 1e-6, 90)
    row = data.measure_waiting("slow", slow, **shape, warm_up_updates=1, say=lambda line: None)
    assert row["seconds"] == pytest.approx(0.02)  # busy: 100 positions at 5,000 a second
    assert row["data_wait_fraction"] == pytest.approx(0.75) and row["longest_wait_seconds"] == pytest.approx(0.06)
    assert row["positions_per_second"] == pytest.approx(100 / 0.08)
    assert row["tokens_per_second"] == pytest.approx(90 / 0.08)
    assert row["possible_positions_per_second"] == pytest.approx(100 / 0.06)
    row = data.measure_waiting("fast", fast, **shape, warm_up_updates=1, say=lambda line: None)
    assert row["data_wait_fraction"] < 1e-3 and "fast" in data.data_table([row])


def test_document_by_document_is_the_library_a_text_at_a_time() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    texts = ["a b", "a b a b a b", "", "b"]
    assert list(data.document_by_document(texts, tokenizer.to_str(), seq_len=4, batch_size=3)) == [2, 4, 0, 1]
