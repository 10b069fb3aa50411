"""A source of text is one file:

    @SOURCES.register("local")
    @dataclass
    class Local(SourceConfig):
        path: Any = MISSING                      # the keys under `data.`, with defaults in conf/data/local.yaml
        def open_training(self): ...             # -> Source, see data/documents.py

`data=NAME` chooses it, and `config.data` is the object.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from sltrain.data.documents import Source
from sltrain.registry import Registry


@dataclass
class SourceConfig:
    """Base class of sources, with the options that all have. Only `open_training` must be defined."""

    name: str = MISSING
    num_streams: int = 8  # logical streams the corpus is dealt to; more of them spread over more ranks
    shuffle_block: int = 1024  # documents shuffled together
    holdout_every: int = 100  # one document in this many is held out when there is no validation set

    SETTLED: ClassVar[tuple[str, ...]] = ()  # options that `settled` sets; they hold for the same corpus only

    def complete(self, new_source: "NewSource") -> None:
        """Make the sources that this one is made of; `new_source` gives a source, by its name, these options over its
        defaults. Called once, before `check`. Raises ValueError as that does."""

    def check_continues(self, earlier: "SourceConfig") -> None:
        """Raise ValueError if a run that began with `earlier` cannot continue with these options, for a reason that
        comparing option by option does not show."""

    def check(self) -> None:
        """Raise ValueError, naming key, value and remedy, for impossible options."""
        for key, least in {"num_streams": 1, "shuffle_block": 1, "holdout_every": 2}.items():
            if getattr(self, key) < least:
                raise ValueError(f"data.{key}={getattr(self, key)}: must be at least {least}")
        if (mode := getattr(self, "on_bad_data", "skip")) not in ("skip", "stop"):
            raise ValueError(f"data.on_bad_data={mode}: choose one of skip, stop")

    def own_tokenizer(self) -> str | None:
        """What tokenizer=auto means, if the corpus comes with one; None: what it means elsewhere."""
        return None

    def open_training(self) -> Source:
        """The documents to train on. Raises ValueError or OSError if the corpus cannot be opened."""
        raise TypeError(f"{type(self).__name__} does not define open_training")

    def settled(self) -> "SourceConfig":
        """These options, with what may change from one process to the next settled, such as the commit of a branch.
        Raises ValueError or OSError if the corpus cannot be opened."""
        return self

    def adopt(self, settled: "SourceConfig") -> None:
        """Take over what was settled for the same corpus, by another rank or when the run began."""

    def open_validation(self) -> Source | None:
        """The corpus's own validation split; None: one in `holdout_every` training documents is held out."""
        return None


NewSource = Callable[[str, Mapping[str, Any]], SourceConfig]

SOURCES: Registry[SourceConfig] = Registry("data", "sltrain.data.sources", "sltrain.sources")
