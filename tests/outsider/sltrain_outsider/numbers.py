"""data=numbers: documents that count, in words."""

from collections.abc import Iterator
from dataclasses import dataclass

from sltrain.data.documents import Document, Source, Wanted
from sltrain.data.sources.base import SOURCES, SourceConfig

WORDS = "zero one two three four five six seven eight nine".split()


@SOURCES.register("numbers")
@dataclass
class Numbers(SourceConfig):
    """Options of data=numbers."""

    num_documents: int = 400  # in each of four shards

    def open_training(self) -> Source:
        return Counting(self.num_documents)


class Counting:
    """Document i counts from i on."""

    name = "numbers"
    num_shards = 4

    def __init__(self, num_documents: int) -> None:
        self.num_documents = num_documents

    def fingerprint(self) -> str:
        return f"numbers {self.num_documents}"

    def shard_sizes(self) -> list[int]:
        return [self.num_documents] * self.num_shards

    def check(self) -> None:
        """Nothing can be missing."""

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        for index in filter(wanted or (lambda index: True), range(start, self.num_documents)):
            numbers = range(self.num_shards * index + shard, self.num_shards * index + shard + 30)
            yield Document(index, " ".join(WORDS[int(digit)] for number in numbers for digit in str(number)))
