"""data=mix: several sources, each with a weight, trained on side by side.

    data.mix={wiki: {path: /text/*.json.gz, weight: 0.7}, code: {repo: OWNER/NAME, weight: 0.3}}

An entry has a weight and the keys of another source: the one that `source` names, or local if it has a `path`, hf if
it has a `repo`. `validation_path` names text of its own to evaluate it on; else its corpus's validation split counts,
or one in `holdout_every` of its documents. `eval_weight` is its part of evaluations, if that is not to be `weight`: the
losses of runs with other weights then compare. What is drawn: data/mixed_stream.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from sltrain.data.documents import Source
from sltrain.data.mixture import Mixture, Part, errors_of
from sltrain.data.sources.base import SOURCES, NewSource, SourceConfig
from sltrain.data.sources.local import LocalFiles

OWN_KEYS = ("source", "weight", "eval_weight", "validation_path")
INFERRED = {"path": "local", "repo": "hf"}  # key -> the source that an entry with it means
# Of an entry, while a run is stopped. Which text there is, is compared by its fingerprint (data/stream.py).
MAY_CHANGE = {"weight", "eval_weight", "validation_path", "path", "repo", "on_bad_data", "delete_after_use"}


@dataclass
class Entry:
    """One entry of data.mix, read."""

    source: SourceConfig
    weight: float  # in training
    eval_weight: float  # in evaluations
    validation_path: Any  # a glob or a list of them; None: the source's own split, or held-out documents


@SOURCES.register("mix")
@dataclass
class Mix(SourceConfig):
    """Options of data=mix."""

    mix: dict[str, Any] = field(default_factory=dict)  # {NAME: {weight: NUMBER, path: GLOB}, ...}; or repo:, source:
    settled_entries: Any = None  # NAME -> what a branch stood for when the run began; the run sets it

    SETTLED: ClassVar[tuple[str, ...]] = ("settled_entries",)

    def __post_init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def complete(self, new_source: NewSource) -> None:
        mix, self.mix = self.mix, {}
        for name, options in mix.items():
            kind = _kind(name, options)
            self.mix[name] = {"source": kind, **options}
            own = {key: value for key, value in options.items() if key not in OWN_KEYS}
            with errors_of(name):
                source = new_source(kind, own | (self.settled_entries or {}).get(name, {}))
            weight = _weight(name, options, "weight")
            eval_weight = weight if options.get("eval_weight") is None else _weight(name, options, "eval_weight")
            self.entries[name] = Entry(source, weight, eval_weight, _validation_path(name, options))

    def check(self) -> None:
        super().check()
        if len(self.entries) < 2:
            found = f"has {', '.join(self.entries)} only" if self.entries else "is empty"
            raise ValueError(
                f"data.mix {found}; a mixture needs two sources or more, as in"
                " 'data.mix={a:{path:/text/a/*.gz,weight:0.7},b:{path:/text/b/*.gz,weight:0.3}}'"
            )
        for name, entry in self.entries.items():
            with errors_of(name):
                entry.source.check()

    def check_continues(self, earlier: SourceConfig) -> None:
        if not isinstance(earlier, Mix):
            return
        if self.mix.keys() != earlier.mix.keys():
            raise ValueError(
                f"data.mix has the sources {', '.join(sorted(self.mix))}, and the run began with"
                f" {', '.join(sorted(earlier.mix))}: none can be added or removed; use the old ones, or start a new run"
            )
        for name, options in self.mix.items():
            old = earlier.mix[name]
            for key in sorted((options.keys() | old.keys()) - MAY_CHANGE):
                if options.get(key) != old.get(key):
                    raise ValueError(
                        f"data.mix.{name}.{key} was {old.get(key)!r}, is now {options.get(key)!r}: only weights may"
                        " change; use the old value, or start a new run"
                    )

    def own_tokenizer(self) -> str | None:
        found = (entry.source.own_tokenizer() for entry in self.entries.values())
        return next((name for name in found if name is not None), None)

    def settled(self) -> SourceConfig:
        for name, entry in self.entries.items():
            with errors_of(name):
                entry.source.settled()
        self._remember()
        return self

    def adopt(self, settled: SourceConfig) -> None:
        if isinstance(settled, Mix):
            for name in self.entries.keys() & settled.entries.keys():
                self.entries[name].source.adopt(settled.entries[name].source)
            self._remember()

    def _remember(self) -> None:
        """Keep what has been settled for the entries where config.yaml stores it."""
        found = {
            name: {key: getattr(entry.source, key) for key in entry.source.SETTLED}
            for name, entry in self.entries.items()
        }
        known = {name: {k: v for k, v in options.items() if v is not None} for name, options in found.items()}
        self.settled_entries = {name: options for name, options in known.items() if options} or None

    def open_training(self) -> Mixture:
        parts = {}
        for name, (training, validation) in self._opened.items():
            parts[name] = Part(training, self.entries[name].weight, 0 if validation else self.holdout_every)
        return Mixture(parts)

    def open_validation(self) -> Mixture:
        parts = {}
        for name, (training, validation) in self._opened.items():
            holdout_every = 0 if validation else self.holdout_every
            parts[name] = Part(validation or training, self.entries[name].eval_weight, holdout_every)
        return Mixture(parts)

    @cached_property
    def _opened(self) -> dict[str, tuple[Source, Source | None]]:
        """The training text of each entry, and its validation text if that is one of its own."""
        opened = {}
        for name, entry in self.entries.items():
            with errors_of(name):
                opened[name] = entry.source.open_training(), _open_validation(entry)
        return opened


def _open_validation(entry: Entry) -> Source | None:
    if entry.validation_path is None:
        return entry.source.open_validation()
    return LocalFiles(
        entry.validation_path,
        on_bad_data=getattr(entry.source, "on_bad_data", "skip"),
        key="validation_path",
        text_key=getattr(entry.source, "text_key", "text"),
    )


def _kind(name: str, options: Any) -> str:
    """The source that an entry means. Raises ValueError for an entry that cannot be read."""
    key = f"data.mix.{name}"
    if not name.isidentifier():
        raise ValueError(f"data.mix: {name!r} cannot name a source; use letters, digits and _, as in wiki_en")
    if not isinstance(options, Mapping):
        raise ValueError(f"{key}={options}: must be a mapping, as in {name}:{{path:/text/*.json.gz,weight:0.7}}")
    kind = options.get("source") or next((INFERRED[known] for known in INFERRED if known in options), None)
    names = [known for known in SOURCES.names() if known != "mix"]
    if kind == "mix" or "mix" in options:
        raise ValueError(f"{key}: a mixture cannot be part of another; write its sources here, each with its weight")
    if kind is None:
        raise ValueError(f"{key} names no text: it needs path=GLOB, repo=OWNER/NAME, or source={'|'.join(names)}")
    if kind not in names:
        raise ValueError(f"{key}.source={kind}: choose one of {', '.join(names)}")
    shared = [item.name for item in fields(SourceConfig) if item.name != "name"]
    known_keys = [item.name for item in fields(SOURCES.load(kind)) if item.name not in ("name", *shared)]
    for unknown in options.keys() - {*known_keys, *OWN_KEYS}:
        if unknown in shared:
            raise ValueError(f"{key}.{unknown}: it holds for all sources of a mixture; set data.{unknown}")
        raise ValueError(
            f"{key}.{unknown}: source={kind} has no such key; an entry has {', '.join([*OWN_KEYS, *known_keys])}"
        )
    return str(kind)


def _weight(name: str, options: Mapping[str, Any], key: str) -> float:
    weight = options.get(key)
    if weight is None:
        raise ValueError(f"data.mix.{name} has no {key}; add {key}=NUMBER, its part of the rows")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"data.mix.{name}.{key}={weight}: must be a number above 0")
    return float(weight)


def _validation_path(name: str, options: Mapping[str, Any]) -> Any:
    globs = options.get("validation_path")
    if globs is not None and not all(isinstance(g, str) and g for g in (globs if isinstance(globs, list) else [globs])):
        raise ValueError(f"data.mix.{name}.validation_path={globs}: must be a glob, or a list of them")
    return globs
