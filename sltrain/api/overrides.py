"""Keyword arguments -> command line overrides: max_steps=50, data="stdlib" -> max_steps=50 data=stdlib.

A dict holds the options of a group (method={"name": "low_rank", "rank": 8} -> method=low_rank method.rank=8), or the
entries of a mapping (rank_overrides={"q_proj": 8}). Strings are quoted for Hydra's grammar.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from sltrain.compose import TRAIN, groups_of

SPECIAL = re.compile(r"([()\[\]{}:=,\\ \t])")  # to be escaped in an unquoted word


def as_overrides(keys: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[str]:
    """Overrides for these keys, followed by `overrides`. Raises ValueError for a value that no override can express."""
    if isinstance(overrides, str):
        raise ValueError(f"overrides={overrides!r}: give a list of strings, such as [{overrides!r}]")
    groups = groups_of(TRAIN)
    return [text for key, value in keys.items() for text in _typed(key, value, groups)] + list(overrides)


def _typed(key: str, value: Any, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if key not in groups:
        yield f"{key}={_literal(key, value)}"
    elif isinstance(value, Mapping):
        options = dict(value)
        if "name" in options:
            yield from _typed(key, options.pop("name"), groups)
        for option, inner in options.items():
            yield f"{key}.{option}={_literal(f'{key}.{option}', inner)}"
    elif value is None or isinstance(value, str):
        yield f"{key}={_bare(key, value)}"
    else:
        raise ValueError(f"{key}={value!r}: give a name ({', '.join(groups[key])}), or a dict with a name and options")


def _literal(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, str | os.PathLike):
        return QuotedString(os.fspath(value), Quote.single).with_quotes()
    if isinstance(value, Mapping):
        entries = (f"{_bare(key, name)}:{_literal(f'{key}[{name!r}]', inner)}" for name, inner in value.items())
        return f"{{{','.join(entries)}}}"
    if isinstance(value, Sequence):
        return f"[{','.join(_literal(key, inner) for inner in value)}]"
    raise ValueError(
        f"{key}={value!r}: a {type(value).__name__} cannot be a value; give a number, a string, a path, True, False or"
        " None, or a list or dict of them"
    )


def _bare(key: str, word: Any) -> str:
    """A word without quotes, as Hydra wants names."""
    if word is None:
        return "null"
    if not isinstance(word, str) or not word.strip() or "\n" in word:
        raise ValueError(f"{key}: {word!r} is no name")
    return SPECIAL.sub(r"\\\1", word)
