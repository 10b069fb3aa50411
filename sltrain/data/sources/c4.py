"""data=c4: allenai/c4, or another data set in numbered shards on the Hugging Face Hub.

A shard is downloaded when its stream begins it, and the next one of the stream while it is read: C4 has 300 MB and
356,000 documents a shard, which last for hours of training. What is in the Hub's cache is not downloaded again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sltrain.data.documents import BadData, Document, NetworkError, Source, Wanted
from sltrain.data.download import DEFAULT_RETRY, Downloads, RetryPolicy
from sltrain.data.records import read_documents
from sltrain.data.sources.base import SOURCES, SourceConfig


@SOURCES.register("c4")
@dataclass
class C4(SourceConfig):
    """Options of data=c4."""

    repo: str | None = None  # data set on the Hugging Face Hub
    revision: str | None = None  # its commit
    train_file: str | None = None  # path template with {shard} and {num_shards}
    num_train_shards: int = 0
    validation_file: str | None = None
    num_validation_shards: int = 0
    delete_after_use: bool = False  # remove each training shard from the Hub's cache when it has been read
    on_bad_data: str = "skip"  # skip or stop

    def open_training(self) -> Source:
        return self._open(self.train_file, self.num_train_shards, self.delete_after_use)

    def open_validation(self) -> Source:
        return self._open(self.validation_file, self.num_validation_shards, delete_after_use=False)

    def _open(self, template: str | None, num_shards: int, delete_after_use: bool) -> "HubShards":
        if not (self.repo and self.revision and template and num_shards):
            raise ValueError(
                "data=c4 needs data.repo, data.revision, and a file template and a number of shards for both train and"
                " validation"
            )
        return HubShards(self.repo, self.revision, template, num_shards, self.on_bad_data, delete_after_use)


@dataclass(eq=False)
class HubShards:
    """One split of a data set repository as a source, one shard a file. Raises ValueError for a wrong template or
    number of shards."""

    repo: str  # such as allenai/c4
    revision: str  # a commit, so that the corpus cannot change during a run
    file_template: str  # as in "en/c4-train.{shard:05d}-of-{num_shards:05d}.json.gz"
    num_shards: int
    on_bad_data: str = "skip"
    delete_after_use: bool = False
    retry: RetryPolicy | None = None  # None: DEFAULT_RETRY

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ValueError(f"{self.repo}: the number of shards is {self.num_shards}; it must be at least 1")
        template = self.file_template
        try:
            self.files = [template.format(shard=i, num_shards=self.num_shards) for i in range(self.num_shards)]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{template!r} is not a file template: it may use {{shard}} and {{num_shards}} ({error})"
            ) from None
        self.name = f"{self.repo}/{template}"
        self.bad = BadData(self.on_bad_data)
        self.downloads = Downloads(self.repo, self.revision, self.retry or DEFAULT_RETRY)

    def fingerprint(self) -> str:
        return f"{self.repo}@{self.revision}, {self.num_shards} shards, first {self.files[0]}"

    def shard_sizes(self) -> list[int]:
        return [1] * self.num_shards  # the Hub's data sets are cut evenly

    def check(self) -> None:
        """Make one small request. Raises NetworkError if the Hub cannot be reached, DataError if it lacks the file."""
        try:
            self.downloads.check(self.files[0])
        except NetworkError as error:
            raise NetworkError(f"{error}; check the connection, or use data=local path=GLOB or data=stdlib") from None

    def expect(self, shard: int) -> None:
        """Begin to download a shard."""
        self.downloads.start(self.files[shard])

    def documents(self, shard: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Document]:
        file = self.files[shard]
        path = self.downloads.path(file)
        yield from read_documents(lambda: open(path, "rb"), f"{self.repo}/{file}", self.bad, start, wanted)
        if self.delete_after_use and wanted is None:  # otherwise other streams read this shard too
            self.downloads.delete(file)
