"""What `--help` prints of a command that takes overrides: config groups, keys, and the options of each plug-in."""

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from sltrain.compose import PLUGINS, TRAIN, Schema, groups_of, option_names
from sltrain.config import TrainConfig


def help_text(schema: Schema = TRAIN) -> str:
    """What `--help` prints: the groups with their options, and every key with the comment it has in the schema."""
    groups = groups_of(schema)
    lines = ["Groups (GROUP=OPTION):"] if groups else []
    lines += [f"  {group:11} {', '.join(options)}" for group, options in groups.items()]
    lines += ["", f"Keys (KEY=VALUE); {schema.order}:"]
    lines += [f"  {key:25} {comment}".rstrip() for key, comment in _comments(schema.type) if key not in groups]
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
        plugin = PLUGINS[group].load(name)
    except ValueError as error:
        return [f"  {error}"]
    comments = {key: text for kind in plugin.__mro__ if is_dataclass(kind) for key, text in _comments(kind)}
    keys = {item.name for item in fields(TrainConfig)}
    options = option_names(group, name)
    first = f"  {group}={name}: {', '.join(key for key in options if key in keys)}".rstrip(": ")
    return [first, *(f"    {key:23} {comments.get(key, '')}".rstrip() for key in options if key not in keys)]
