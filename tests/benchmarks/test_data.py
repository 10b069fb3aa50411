"""The data benchmark's own arithmetic, on work whose size is known."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers

from sltrain.benchmarks import data, timing
from sltrain.benchmarks.base import Bench
from sltrain.data.documents import Document


def stream(clock: Any, seconds: float, tokens: int, by_others: float = 0) -> Iterator[int]:
    """An endless stream that counts `tokens` for so many seconds of work, and of another thread's work."""
    while True:
        clock.work(seconds)
        clock.others += by_others
        yield tokens


def test_ratios_follow_the_processor_time_of_a_token(clock_of: Callable[..., Any], bench: Callable[..., Bench]) -> None:
    subject = bench("what=data", "repeats=3")
    clock = clock_of(data, timing)
    streams = {
        "half the work": stream(clock, 2.0, 80),
        "the same work": stream(clock, 2.0, 40),
        "in the background": stream(clock, 0.0, 5, by_others=0.5),
    }
    rows = data.measure_throughput(subject, stream(clock, 0.05, 1), streams)
    assert [row["measured"] for row in rows] == [data.ONE_BY_ONE, *streams]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([20, 40, 20, 10])
    assert [row["ratio_to_document_by_document"] for row in rows] == pytest.approx([1, 2, 1, 0.5])
    assert [row["seconds"] for row in rows] == pytest.approx([50e3, 25e3, 50e3, 100e3])


def test_a_process_that_never_rests_is_waited_for_no_longer(
    clock_of: Callable[..., Any], bench: Callable[..., Bench]
) -> None:
    subject = bench("what=data", "repeats=1")
    clock = clock_of(data, timing)
    clock.others = 1e9
    data.measure_throughput(subject, stream(clock, 0, 1), {})
    assert clock.now == pytest.approx(4 * data.MAX_REST_WAIT_SECONDS, abs=6 * data.REST_SECONDS)


def test_a_consumer_waits_for_a_stream_that_is_slower_than_it(clock_of: Callable[..., Any]) -> None:
    clock = clock_of(data)
    row = data.measure_waiting(stream(clock, 0.06, 90), busy=0.02)
    assert row["data_wait_fraction"] == pytest.approx(0.75) and row["longest_wait_seconds"] == pytest.approx(0.06)
    assert (row["updates_per_second"], row["tokens_per_second"]) == (pytest.approx(1 / 0.08), pytest.approx(90 / 0.08))
    assert data.measure_waiting(stream(clock, 1e-6, 90), busy=0.02)["data_wait_fraction"] < 1e-3


def test_document_by_document_is_the_library_a_text_at_a_time() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()

    class Source:
        num_shards = 2

        def documents(self, shard: int) -> Iterator[Document]:
            texts = (["a b", "a b a b a b"], ["", "b"])[shard]
            return (Document(index, text) for index, text in enumerate(texts))

    found = data.document_by_document(Source(), tokenizer.to_str(), seq_len=4, batch_size=3)
    assert [next(found) for _ in range(9)] == [2, 4, 0, 1, 2, 4, 0, 1, 2]
