"""A logical stream of a mixture: which source each of its rows comes from.

Row n of logical stream s comes from the source that a hash of (seed, s, n) draws in proportion to the weights
(`order.drawn`). Neither the number of processes nor a restart enters it, so the rows are those of an uninterrupted run.
Each source has a logical stream of its own (logical_stream.py), which advances when it is drawn: its rows, in order,
are those that it gives without the others, epochs and shuffling included.

The position nests: the number of rows drawn, and the position in each source. With other weights a run goes on from
there, and only the rows that follow are drawn otherwise.
"""

from dataclasses import dataclass, field
from typing import Any

from sltrain.data.logical_stream import LogicalStream, Position, Row
from sltrain.data.order import drawn


@dataclass
class MixedPosition:
    """The position of a logical stream of a mixture."""

    row: int = 0  # rows drawn since the start of the run
    sources: dict[str, Position] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # read from each source since the start, without pads

    @classmethod
    def of(cls, state: dict[str, Any]) -> "MixedPosition":
        """The position that `dataclasses.asdict` made `state` of."""
        sources = {name: Position(**position) for name, position in state["sources"].items()}
        return cls(state["row"], sources, dict(state["tokens"]))


class MixedStream:
    """Logical stream `number` of a mixture.

    Args:
        weights: of each source, in a fixed order.
        streams: the logical stream of each source, at its position in `at`.
        at: where to begin.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        weights: dict[str, float],
        streams: dict[str, LogicalStream],
        at: MixedPosition,
    ) -> None:
        self.number, self._seed = number, seed
        self._names, self._weights = list(weights), list(weights.values())
        self._streams, self._num_rows = streams, at.row
        self.tokens = {name: at.tokens.get(name, 0) for name in weights}

    @property
    def at(self) -> MixedPosition:
        """The position after the last row."""
        return MixedPosition(self._num_rows, {name: stream.at for name, stream in self._streams.items()}, self.tokens)

    @property
    def epochs(self) -> dict[str, int]:
        """How often each source has been read to its end."""
        return {name: stream.at.epoch for name, stream in self._streams.items()}

    def row(self, padding: str, seq_len: int) -> Row:
        """The next row of the source that is drawn."""
        name = self._names[drawn(self._weights, "mix", self._seed, self.number, self._num_rows)]
        row = self._streams[name].row(padding, seq_len)
        self._num_rows += 1
        self.tokens[name] += len(row.ids)
        return row
