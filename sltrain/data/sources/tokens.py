"""data=tokens: a folder of ids that `sltrain-tokenize` wrote. Training tokenizes nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltrain.data.documents import Source
from sltrain.data.sources.base import SOURCES, SourceConfig


@SOURCES.register("tokens")
@dataclass
class Tokens(SourceConfig):
    """Options of data=tokens."""

    path: Any = None  # the folder

    def check(self) -> None:
        super().check()
        if not isinstance(self.path, str) or not self.path.strip():
            raise ValueError(f"data=tokens path={self.path}: needs one folder that sltrain-tokenize made, path=DIR")

    def own_tokenizer(self) -> str | None:
        return self.path if isinstance(self.path, str) else None

    def open_training(self) -> Source:
        return self._open("train")

    def open_validation(self) -> Source:
        return self._open("validation")

    def _open(self, part: str) -> Source:
        from sltrain.data.token_folder import TokenFiles  # with it the tokenizers, which a configuration does not need

        return TokenFiles(Path(self.path).expanduser(), part)
