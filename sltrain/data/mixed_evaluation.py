"""The validation rows of a mixture: those of each source (evaluation.py), source after source.

Each source gets its share of `eval_tokens`, by its weight there: that of training unless another is set. The mean over
all predicted tokens is then the loss that training makes smaller, in the proportions of training, and the loss of each
source stands beside it. A source with less text than its share is evaluated on what it has.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from sltrain.data.documents import Source
from sltrain.data.evaluation import EvalBatch, EvalSet
from sltrain.data.mixture import Mixture, errors_of


class MixedEvalSet:
    """Repeatable iterable of this rank's EvalBatch, with the interface of EvalSet.

    Args:
        source: the validation text of each source. A part with `holdout_every` is training text, of which the
            held-out documents are read.
        eval_tokens: predicted tokens of all sources together.
        new_set: (source, eval_tokens, holdout_every) -> the rows of one of them.
    """

    def __init__(self, source: Mixture, eval_tokens: int, new_set: Callable[[Source, int, int], EvalSet]) -> None:
        self.source, self.eval_tokens = source, eval_tokens
        self._sets: dict[str, EvalSet] = {}
        for name, share in source.shares().items():
            part = source.parts[name]
            with errors_of(name):
                self._sets[name] = new_set(part.source, max(round(share * eval_tokens), 1), part.holdout_every)
        self.sources = tuple(self._sets)
        self.batch_size = next(iter(self._sets.values())).batch_size

    def read(self) -> None:
        """Read the text now. Raises DataError for a source without any."""
        for name, rows in self._sets.items():
            with errors_of(name):
                rows.read()

    def share_of(self, token: int) -> float:
        """The largest share of this token among the ids of a source on this rank."""
        return max(rows.share_of(token) for rows in self._sets.values())

    @property
    def num_targets(self) -> int:
        """Predicted tokens of all sources on all ranks."""
        return sum(rows.num_targets for rows in self._sets.values())

    @property
    def short_sources(self) -> tuple[str, ...]:
        """The sources whose text ended before their share was found."""
        return tuple(name for name, rows in self._sets.items() if rows.exhausted)

    @property
    def exhausted(self) -> bool:
        """Whether there are any such sources."""
        return bool(self.short_sources)

    def __len__(self) -> int:
        return sum(map(len, self._sets.values()))

    def __iter__(self) -> Iterator[EvalBatch]:
        for name, rows in self._sets.items():
            for batch in rows:
                yield replace(batch, source=name)
