"""data=c4: allenai/c4, or another data set in numbered shards, streamed from the Hugging Face Hub."""

from dataclasses import dataclass

from sltrain.data.documents import Source
from sltrain.data.hub import HubFiles
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
    on_bad_data: str = "skip"  # skip or stop

    def open_training(self) -> Source:
        return self._open(self.train_file, self.num_train_shards)

    def open_validation(self) -> Source:
        return self._open(self.validation_file, self.num_validation_shards)

    def _open(self, template: str | None, num_shards: int) -> HubFiles:
        if not (self.repo and self.revision and template and num_shards):
            raise ValueError(
                "data=c4 needs data.repo, data.revision, and a file template and a number of shards for both train and"
                " validation"
            )
        return HubFiles(self.repo, self.revision, template, num_shards, on_bad_data=self.on_bad_data)
