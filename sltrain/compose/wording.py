"""What is wrong with what was typed, in one line that names the key and what to type instead."""

import difflib
import re
from collections.abc import Collection, Sequence

from hydra import compose
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from sltrain.compose.other_names import OTHER_NAMES, REMOVED
from sltrain.compose.schema import PLUGINS, SCHEMA, TRAIN, Schema, groups_of, known_keys, option_names, plugin_defaults
from sltrain.log import first_line


def refuse_unknown_key(override: Override, schema: Schema) -> None:
    """Refuse a key that neither the schema nor a config group knows, with the nearest names."""
    key = override.key_or_group
    group, _, option = key.partition(".")
    if schema is TRAIN and group in PLUGINS and option == "name":
        raise ValueError(f"{key} is not set by itself: choose with {group}={override.value()}")
    known = known_keys(schema)
    is_hydras = schema.has_groups and (key.split(".")[0] == "hydra" or key.startswith("hydra/"))
    if is_hydras or key in groups_of(schema) or key in known:
        return
    if any(key.startswith(f"{name}.") for name in schema.open_mappings):
        return
    if group in PLUGINS and f"{group}.{option.partition('.')[0]}" in known:  # an entry of a mapping
        return
    raise ValueError(f"unknown key {key!r}; {_hint(key, schema)}")


def refuse_flags(arguments: Sequence[str], flags: Collection[str]) -> None:
    """Raise ValueError for `--rank 64` and the like, with the override to type instead; `flags` are those that
    `sltrain-train` has."""
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=False):
        flag, has_value, value = argument.partition("=")
        if not argument.startswith("-") or flag in flags:
            continue
        if not has_value:
            value = "VALUE" if following.startswith("-") or "=" in following else following
        key = flag.lstrip("-").replace("-", "_")
        ours = _our_name(key, TRAIN) or (key if key in groups_of(TRAIN) else None)
        is_key = ours is not None and ours.replace(".", "").isidentifier()
        hint = f"type {ours}={value}" if is_key else _hint(key, TRAIN)
        raise ValueError(f"{argument}: keys are typed without dashes, as KEY=VALUE; {hint}")


def _our_name(key: str, schema: Schema) -> str | None:
    """What a key in another spelling, or of another trainer, is called here, section or not (`training.max_steps`)."""
    known, plain = known_keys(schema), key.lower().replace("-", "_")
    names = (plain, plain.rpartition(".")[2])
    ours = next((name for name in names if name in known), None)
    if ours is None and schema is TRAIN:
        ours = next((OTHER_NAMES[name] for name in names if name in OTHER_NAMES), None)
    return ours


def _hint(key: str, schema: Schema) -> str:
    """What to type instead of an unknown key."""
    if ours := _our_name(key, schema):
        return f"here it is {ours}"
    near = difflib.get_close_matches(key.lower(), known_keys(schema), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"sltrain-{schema.name} --help lists the keys"


def removed_option(group: str, option: str) -> str | None:
    """One line for an option of an earlier version that is gone; None for any other."""
    instead = REMOVED.get(f"{group}={option}")
    return None if instead is None else f"{group}={option} does not exist any more; {instead}"


def missing_option(error: MissingConfigException) -> str:
    """One line for a group's option, such as model=NAME, that has no file or whose plug-in cannot be used."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if gone := removed_option(group, option):
        return gone
    if option.startswith("submitit_"):
        return "hydra/launcher=slurm needs hydra-submitit-launcher: pip install '.[sweep]'"
    if group in PLUGINS and option in PLUGINS[group].names():
        try:
            plugin_defaults(group, option)
        except Exception as reason:  # the plug-in is there and cannot be used
            text = first_line(reason)
            return text if text.startswith(f"{group}={option}") else f"{group}={option} cannot be used: {text}"
    options = [name for name in error.options or [] if not name.endswith(SCHEMA)]
    near = difflib.get_close_matches(option, options, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'{group}={name}' for name in near)}? " if near else ""
    return f"{group}={option} does not exist; {hint}there are: {', '.join(options)}"


def composition_error(error: BaseException, overrides: list[str]) -> str:
    """One line for a composition error: the innermost message, and the override it belongs to."""
    text = str(error)
    if "You must specify" in text:
        options = ", ".join(groups_of(TRAIN)["model"])
        return f"no model is chosen: add model=NAME ({options}), or experiment=quickstart"
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    message = first_line(cause)
    if "converted to Integer" in message:
        message += " (write whole numbers out: 1_000_000)"
    if "is not a ListConfig" in message:
        message = "a list is typed in brackets, as in KEY=[A,B]"
    if message.startswith("Could not append"):
        message = f"{message.rstrip('.')}; drop the +"
    if message.startswith("Interpolation key"):
        message += "; ${...} names another key here: for a variable use double quotes in the shell, or ${oc.env:NAME}"
    if (unknown := re.match(r"Could not override '(\w+)\.([\w.]+)'", text)) and unknown[1] in PLUGINS:
        return _foreign_option(unknown[1], unknown[2], overrides)
    typed = next((o for o in reversed(overrides) if key and o.lstrip("+~").partition("=")[0] == key), None)
    return f"{typed or key}: {message}" if (typed or key) else message


def _foreign_option(group: str, option: str, overrides: list[str]) -> str:
    """Why this option cannot be set: it belongs to another plug-in than the chosen one."""
    rest = [text for text in overrides if not text.lstrip("+~").startswith(f"{group}.{option}=")]
    try:
        name = compose(TRAIN.name, rest)[group]["name"]
    except MissingConfigException as error:
        return missing_option(error)
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        return composition_error(error, rest)
    own = option_names(group, name)
    others = [other for other in PLUGINS[group].names() if option in option_names(group, other)]
    belongs = f"it belongs to {group}={', '.join(others)}; " if others else ""
    return f"{group}.{option}: {group}={name} has no such option; {belongs}{name} has {', '.join(own) or 'none'}"
