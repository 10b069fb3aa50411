"""Several sources as one corpus: how large a part each has, and what it holds out.

    p(source) = weight / sum of weights, for every row by itself

Training reads the parts side by side (mixed_stream.py), evaluation one after the other (mixed_evaluation.py), and
`tokenizer=bpe:SIZE` learns from their beginnings in the same proportions (bpe.py).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sltrain.data.documents import DataError, Document, NetworkError, Source, Wanted

OPTION = re.compile(r"(?<![\w/.])data\.(?=(text_key|on_bad_data|config|path|repo|revision)\b)")  # of a source alone


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Inside this context a ValueError or NetworkError, whose kind stays, names this entry of data.mix, and its options
    as they are typed there."""
    try:
        yield
    except (ValueError, NetworkError) as error:
        kind = next(kind for kind in (DataError, NetworkError, ValueError) if isinstance(error, kind))
        entry = f"data.mix.{name}"
        text = OPTION.sub(f"{entry}.", str(error))
        raise kind(text if text.startswith(entry) else f"{entry}: {text}") from error


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    source: Source
    weight: float  # above 0; only its ratio to the others counts
    holdout_every: int  # one document in so many is evaluated on and not trained on; 0: there is no such division


class Mixture:
    """Parts by name, as a source whose shards are those of its parts, part after part. Names are sorted, so that the
    order in which they were typed decides nothing."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self.parts = {name: parts[name] for name in sorted(parts)}
        self.name = " + ".join(f"{name} {share:.3g}" for name, share in self.shares().items())
        self.num_shards = sum(part.source.num_shards for part in self.parts.values())

    def weights(self) -> dict[str, float]:
        """The weight of each part, as typed."""
        return {name: part.weight for name, part in self.parts.items()}

    def shares(self) -> dict[str, float]:
        """The weights divided by their sum."""
        total = sum(part.weight for part in self.parts.values())
        return {name: part.weight / total for name, part in self.parts.items()}

    def fingerprint(self) -> str:
        return "; ".join(f"{name} x {part.weight}: {part.source.fingerprint()}" for name, part in self.parts.items())

    def shard_sizes(self) -> list[int]:
        return [size for part in self.parts.values() for size in part.source.shard_sizes()]

    def check(self) -> None:
        for name, part in self.parts.items():
            with errors_of(name):
                part.source.check()

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        for part in self.parts.values():
            if shard < part.source.num_shards:
                return part.source.documents(shard, start, wanted)
            shard -= part.source.num_shards
        raise IndexError(shard)
