"""What `--help` prints of a command that takes overrides: config groups, keys with their defaults, and the options of
each plug-in.

    seq_len=256                      tokens a row            what stands here if nothing is typed
    rank                             inner size of B A       no default: a model sets it, or whoever types
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from sltrain.compose import PLUGINS, TRAIN, Schema, defaults_of, groups_of, option_defaults
from sltrain.config import TrainConfig

WIDTH = 32  # of a key with its default; a longer one moves its comment
MAX_TEXT = 40  # characters of a key with its default; the rest of a longer one is left out


def help_text(schema: Schema = TRAIN) -> str:
    """What `--help` prints: the groups with their options, and every key with its default and the comment that it has
    in the schema."""
    groups, defaults = groups_of(schema), defaults_of(schema)
    lines = ["Groups (GROUP=OPTION):"] if groups else []
    lines += [f"  {group:15} {', '.join(options)}" for group, options in groups.items()]
    lines += ["", f"Keys (KEY=VALUE, with their defaults); {schema.order}:"]
    lines += [_line(2, key, defaults, comment) for key, comment in _comments(schema.type) if key not in groups]
    for group in PLUGINS if groups else ():
        lines += ["", f"Options by {group} ({group}.KEY=VALUE); those that are keys above too follow them:"]
        for name in PLUGINS[group].names():
            lines += _options_lines(group, name)
    return "\n".join(lines).lstrip("\n")


def _comments(kind: type) -> Iterator[tuple[str, str]]:
    """The fields of a dataclass as its source has them, each with the comment beside it."""
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.strip().partition("  # ")
        key, separator, _ = code.partition(": ")
        if separator and key.isidentifier():
            yield key, comment


def _options_lines(group: str, name: str) -> list[str]:
    """A plug-in's options: in one line those that are keys of a run too, then each other with its comment."""
    try:
        plugin, defaults = PLUGINS[group].load(name), option_defaults(group, name)
    except ValueError as error:
        return [f"  {error}"]
    comments = {key: text for kind in plugin.__mro__ if is_dataclass(kind) for key, text in _comments(kind)}
    keys = {item.name for item in fields(TrainConfig)}
    first = f"  {group}={name}: {', '.join(key for key in defaults if key in keys)}".rstrip(": ")
    return [first, *(_line(4, key, defaults, comments.get(key, "")) for key in defaults if key not in keys)]


def _line(indent: int, key: str, defaults: Mapping[str, Any], comment: str) -> str:
    """A key with its default, as it is typed, and its comment. One without (`???`) is set by a model or by hand."""
    value = defaults[key]
    text = key if value == "???" else f"{key}={_typed(value)}"
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
    return f"{' ' * indent}{shown:{WIDTH - indent}} {comment}".rstrip()


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_typed(inner)}' for key, inner in value.items())}}}"
    return str(value)
