"""The training stream: documents -> shuffled, tokenized, padded or packed batches, each with the state to resume
after it.

The rows of global batch k depend on (seed, k) alone. Documents are dealt to L logical streams (order.py), L being the
largest divisor of global_batch_size (G) that is at most num_streams. Row i of every batch comes from stream i // (G /
L), and rank r of W trains on the rows r * G / W to (r + 1) * G / W - 1. Hence two ranks train the curve of one, and a
run may continue on any number of ranks that divides G.

A rank reads the streams that its rows come from. Where L is no multiple of W, ranks share streams: each of them reads
and tokenizes every row of such a stream, keeps its own, and arrives at the same position. It reads at most G / W + 2 (G
/ L) rows a batch, so sharing costs no communication but tokenization: on 64 ranks and 8 streams each reads what one of
8 ranks would.

Every stream reads its own documents once an epoch, in another order each time (logical_stream.py); of a mixture, those
of the source that is drawn for each row (mixed_stream.py). Batch.state holds the position of every stream of this rank
after the batch, because the stream itself runs ahead in a background thread.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sltrain.data.documents import Source, is_held_out
from sltrain.data.logical_stream import LogicalStream, Position, Row
from sltrain.data.mixed_stream import MixedPosition, MixedStream
from sltrain.data.mixture import Mixture, Part
from sltrain.data.order import DEALINGS, KEYED, MODULO, deal_slices, num_logical_streams, rows_of_rank
from sltrain.data.prefetch import Prefetcher
from sltrain.data.rows import check_row_shape, rows_to_tensors
from sltrain.data.token_folder import ids_of
from sltrain.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

IDENTITY = "identity"  # key of Batch.state beside the stream numbers: what the positions refer to
CORPUS = "the corpus (path, files or Python release)"
DEALING = "dealing"  # of records to streams, see order.py; older states lack it and go on with MODULO
HOLDOUT = "the held-out part (validation_path; data.holdout_every, 0 with a validation set of its own)"
WEIGHTS = "weights"  # of the sources of a mixture, the one thing here that may change while a run is stopped
ALONE = ""  # the name of a source that is not part of a mixture

State = dict[str, dict[str, Any]]  # JSON-able


@dataclass
class Batch:
    """This rank's rows of one global batch."""

    input_ids: Tensor  # this and the following: (rows, T) int64, see rows.py
    labels: Tensor
    positions: Tensor | None  # None: attention=full
    num_tokens: int  # tokens that are not pads
    num_targets: int  # labels[:, 1:] that are not -100
    epoch: int  # epochs that this rank's most advanced stream has finished
    state: State  # stream number -> position after this batch, and IDENTITY -> what the positions refer to
    source_tokens: dict[str, int]  # of a mixture: tokens of each source since the start, in streams that begin here


class TrainStream:
    """Endless iterator of Batch: this rank's rows of the global batches, in order.

    Args:
        source: one corpus, or a Mixture, whose parts say themselves what they hold out.
        seed: decides the order together with global_batch_size and num_streams.
        padding: truncate_pad, pack or best_fit.
        per_document: attention=document; see rows.py.
        shuffle_block: documents shuffled together.
        holdout_every: one document in this many is never trained on (0: all are).
        prefetch: batches kept ready.

    Raises ValueError (also DataError) for settings and corpora that cannot be used; iterating raises DataError or
    NetworkError when the corpus fails.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seed: int,
        seq_len: int,
        padding: str,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_streams: int = 8,
        shuffle_block: int = 1024,
        holdout_every: int = 0,
        prefetch: int = 4,
        per_document: bool = False,
    ) -> None:
        check_row_shape(padding, seq_len)
        if shuffle_block < 1 or holdout_every < 0 or holdout_every == 1:
            raise ValueError(
                f"data.shuffle_block is {shuffle_block} and data.holdout_every is {holdout_every}; the first must be "
                "at least 1, the second 0 (nothing is held out) or at least 2"
            )
        num_logical = num_logical_streams(global_batch_size, num_streams)
        source.check()
        self.source = source
        self.tokenizer = tokenizer
        self.rows_per_stream = global_batch_size // num_logical
        self.prefetch, self.per_document = prefetch, per_document
        self._parts = source.parts if isinstance(source, Mixture) else {ALONE: Part(source, 1.0, holdout_every)}
        self._slices = {
            name: deal_slices(part.source.shard_sizes(), num_logical, seed) for name, part in self._parts.items()
        }
        rows = rows_of_rank(global_batch_size, rank, world_size)
        self._kept = {  # stream number -> which of the rows it gives to a batch are this rank's
            number: range(max(rows.start - first, 0), min(rows.stop - first, self.rows_per_stream))
            for number in range(rows.start // self.rows_per_stream, (rows.stop - 1) // self.rows_per_stream + 1)
            for first in [number * self.rows_per_stream]
        }
        self._identity: dict[str, Any] = {
            **_corpus(source),
            "tokenizer": tokenizer.fingerprint(),
            "seed": seed,
            "seq_len": seq_len,
            "padding": padding,
            "global_batch_size": global_batch_size,
            "data.num_streams": num_logical,
            "data.shuffle_block": shuffle_block,
            DEALING: KEYED,
            HOLDOUT: _holdout(source, holdout_every),
        }
        self.old_weights: dict[str, float] | None = None  # of the loaded state, where they were others
        start = MixedPosition(sources={name: Position() for name in self._parts})
        self._state = self._stamp(dict.fromkeys(self._kept, start if self._is_mixed else start.sources[ALONE]))
        self._ahead: Prefetcher[Batch] | None = None

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        batch = next(self._running())
        self._state = batch.state
        return batch

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next batch; return whether `next` would return at once. Retries on a lost
        network can take minutes."""
        return self._running().wait(seconds)

    def state_dict(self) -> State:
        """The state after the last batch returned. Those of all ranks, merged, are the state of the run."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Continue after the batch that carried `state`, which holds this rank's streams and may hold others.

        Raises ValueError if the corpus or a setting that decides the rows has changed. The weights of a mixture may:
        `old_weights` are then the others.
        """
        saved = {DEALING: MODULO, **state.get(IDENTITY, {})}
        identity = {**self._identity, DEALING: saved[DEALING] if saved[DEALING] in DEALINGS else KEYED}
        for key, new in identity.items():
            old = saved.get(key)
            if old != new and key != WEIGHTS:
                raise ValueError(
                    f"{CORPUS if key == 'corpus' else key} has changed since the checkpoint: it was {old}, "
                    f"now it is {new}; continue with the old one, or start a new run"
                )
        self.close()
        self._identity = identity
        self.old_weights = saved[WEIGHTS] if saved.get(WEIGHTS) != identity.get(WEIGHTS) else None
        self._state = self._stamp({number: self._position(state[str(number)]) for number in self._kept})

    @property
    def weights(self) -> dict[str, float]:
        """Of the sources of a mixture."""
        return self._identity.get(WEIGHTS, {})

    def close(self) -> None:
        """Stop the background thread. Iterating again continues after the last batch returned."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _running(self) -> Prefetcher[Batch]:
        if self._ahead is None:
            self._ahead = Prefetcher(self._batches(self._state), self.prefetch)
        return self._ahead

    def _batches(self, state: State) -> Iterator[Batch]:
        """The batches after `state`. Runs in the background thread, so it shares nothing mutable with the consumer."""
        seq_len, padding = self._identity["seq_len"], self._identity["padding"]
        streams = [self._open(number, self._position(state[str(number)])) for number in self._kept]
        begun = [stream for stream in streams if self._kept[stream.number].start == 0]  # each by one rank
        last_epochs = _highest([stream.epochs for stream in streams])
        while True:
            rows = [row for stream in streams for row in self._rows_of(stream, padding, seq_len)]
            epochs = _highest([stream.epochs for stream in streams])
            for name, epoch in epochs.items():
                if epoch > last_epochs[name]:
                    logger.info(f"epoch {epoch + 1} of {name} begins: the same documents in another order")
            last_epochs = epochs
            tensors = rows_to_tensors(rows, seq_len, self.tokenizer.pad_id, self.per_document)
            yield Batch(
                tensors.input_ids,
                tensors.labels,
                tensors.positions,
                num_tokens=sum(len(row.ids) for row in rows),
                num_targets=tensors.num_targets,
                epoch=max(epochs.values()),
                state=self._stamp({stream.number: stream.at for stream in streams}),
                source_tokens={name: sum(stream.tokens[name] for stream in begun) for name in streams[0].tokens},
            )

    def _rows_of(self, stream: LogicalStream | MixedStream, padding: str, seq_len: int) -> list[Row]:
        """This rank's rows of those that the stream gives to the next batch."""
        kept = self._kept[stream.number]
        return [stream.row(padding, seq_len) for _ in range(self.rows_per_stream)][kept.start : kept.stop]

    def _open(self, number: int, at: Position | MixedPosition) -> LogicalStream | MixedStream:
        """Logical stream `number`, which begins at this position."""
        if isinstance(at, Position):
            return self._open_part(ALONE, number, at)
        streams = {name: self._open_part(name, number, at.sources[name]) for name in self._parts}
        return MixedStream(number, self._identity["seed"], self._identity[WEIGHTS], streams, at)

    def _open_part(self, name: str, number: int, at: Position) -> LogicalStream:
        """Logical stream `number` of one source."""
        max_len = self._identity["seq_len"] if self._identity["padding"] == "truncate_pad" else None
        source, holdout_every = self._parts[name].source, self._parts[name].holdout_every
        return LogicalStream(
            source,
            number,
            self._slices[name][number],
            self._identity["seed"],
            self._identity["data.shuffle_block"],
            self._identity[DEALING],
            encode=lambda documents: ids_of(documents, self.tokenizer, max_len),
            keep=lambda document: not holdout_every or not is_held_out(document.text, holdout_every),
            at=at,
            is_shared=len(self._kept[number]) < self.rows_per_stream,
        )

    @property
    def _is_mixed(self) -> bool:
        return ALONE not in self._parts

    def _position(self, state: dict[str, Any]) -> Position | MixedPosition:
        return MixedPosition.of(state) if self._is_mixed else Position(**state)

    def _stamp(self, positions: Mapping[int, Position | MixedPosition]) -> State:
        return {IDENTITY: self._identity, **{str(number): asdict(at) for number, at in positions.items()}}


def _corpus(source: Source) -> dict[str, Any]:
    """What identifies the corpus, by the names that messages use."""
    if not isinstance(source, Mixture):
        return {"corpus": source.fingerprint()}
    prints = {f"the corpus of data.mix.{name}": part.source.fingerprint() for name, part in source.parts.items()}
    return {"the sources of data.mix": list(source.parts), **prints, WEIGHTS: source.weights()}


def _holdout(source: Source, holdout_every: int) -> int | dict[str, int]:
    """One document in so many is held out; of a mixture, for each source."""
    if not isinstance(source, Mixture):
        return holdout_every
    return {name: part.holdout_every for name, part in source.parts.items()}


def _highest(epochs: list[dict[str, int]]) -> dict[str, int]:
    """The highest number under each name."""
    return {name: max(each[name] for each in epochs) for name in epochs[0]}
