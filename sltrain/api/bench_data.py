"""`sltrain-bench what=data`: the training stream beside tokenizing document by document, and how a GPU would
wait for it."""

import dataclasses
from collections.abc import Iterator

from sltrain.api.bench import SEED, Bench, Result, vocab_size
from sltrain.benchmarks.data import (
    NUM_STREAMS,
    ROUNDS,
    SHUFFLE_BLOCK,
    data_table,
    document_by_document,
    measure_throughput,
    measure_waiting,
)
from sltrain.building.data import build_tokenizer
from sltrain.building.model import build_model
from sltrain.config import TrainConfig
from sltrain.data.documents import Source
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.planning.accounting import count_parameters

PADDINGS = ("truncate_pad", "pack")


def run_data(bench: Bench) -> Result:
    """Throughput of the training stream beside tokenizing document by document, and the waiting of a fast consumer."""
    config, train = bench.config, bench.train
    assert train is not None
    if config.path:
        train = dataclasses.replace(train, data=dataclasses.replace(train.data, name="local"), path=config.path)
    train = dataclasses.replace(train, tokenizer=config.tokenizer)
    source = train.data.open_training(bench.say)
    streams: list[TrainStream] = []

    def stream(padding: str, num_streams: int, shuffle_block: int) -> Iterator[int]:
        streams.append(build_stream(bench, train, source, padding, num_streams, shuffle_block))
        return (batch.num_tokens for batch in streams[-1])

    try:
        json = build_bench_tokenizer(bench, train, source).json
        rows = measure_throughput(
            document_by_document(endless_texts(source), json, train.seq_len, train.global_batch_size),
            {f"stream, {padding}": stream(padding, NUM_STREAMS, SHUFFLE_BLOCK) for padding in PADDINGS},
            rounds=config.repeats or ROUNDS,
            say=bench.say,
        )
        num_parameters = count_parameters(build_model(train, vocab_size(bench), bench.dtype))["total"]
        for padding in PADDINGS:
            rows.append(
                measure_waiting(
                    f"training of {train.model.name}, {padding}",
                    stream(padding, train.data.num_streams, train.data.shuffle_block),
                    positions_per_batch=train.global_batch_size * train.seq_len,
                    num_parameters=num_parameters,
                    say=bench.say,
                )
            )
    finally:
        for open_stream in streams:
            open_stream.close()
    text = data_table(rows)
    return Result([{"measured": row.pop("what"), "ratio_to_dense": None, **row} for row in rows], text)


def build_stream(
    bench: Bench, train: TrainConfig, source: Source, padding: str, num_streams: int, shuffle_block: int
) -> TrainStream:
    """The stream of a run on one process, with a tokenizer, and so a memory of words, of its own."""
    return TrainStream(
        source,
        build_bench_tokenizer(bench, train, source),
        seed=SEED,
        seq_len=train.seq_len,
        padding=padding,
        global_batch_size=train.global_batch_size,
        num_streams=num_streams,
        shuffle_block=shuffle_block,
        on_event=lambda line: None,  # a small corpus begins again and again
        prefetch=2,
    )


def build_bench_tokenizer(bench: Bench, train: TrainConfig, source: Source) -> Tokenizer:
    return build_tokenizer(train, source, Ranks(rank=0, world_size=1, device=bench.device), bench.say)


def endless_texts(source: Source) -> Iterator[str]:
    """The texts of a corpus, again and again."""
    while True:
        for shard in range(source.num_shards):
            for document in source.documents(shard):
                yield document.text
