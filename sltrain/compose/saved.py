"""A run's config.yaml, of this version or an earlier one -> its configuration."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.compose.other_names import READ_AS
from sltrain.compose.schema import PLUGINS, conf_dir, option_names, plugin_defaults, train_schema
from sltrain.compose.typed import to_train_config
from sltrain.compose.wording import composition_error
from sltrain.config import RETIRED_KEYS, TrainConfig
from sltrain.config_checks import validate
from sltrain.log import first_line


def read_config(path: Path) -> TrainConfig:
    """The checked configuration in a run's config.yaml. A key that did not exist when the run was made gets its default
    from conf/train.yaml; RETIRED_KEYS are dropped. Raises ValueError."""
    try:
        result = to_train_config(read_saved(path))
        validate(result)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        reason = composition_error(error, []) if isinstance(error, OmegaConfBaseException) else first_line(error)
        raise ValueError(f"{path} is damaged, or of another version: {reason}") from error
    return result


def read_saved(path: Path) -> DictConfig:
    """config.yaml over the defaults, unchecked. An option of a plug-in that follows a key of the run (data.path the key
    path), and was not set apart from it, follows it still. A plug-in that was removed keeps its name, with the options
    of the one that reads it."""
    schema = train_schema()
    names = {key.name for key in fields(TrainConfig)}
    defaults = {key: value for key, value in OmegaConf.load(conf_dir() / "train.yaml").items() if key in names}
    saved = yaml.safe_load(path.read_bytes())
    if not isinstance(saved, dict):
        raise ValueError("it should map keys to values")
    saved = {key: value for key, value in saved.items() if key not in RETIRED_KEYS}
    own = {group: _saved_options(group, saved) for group in PLUGINS}
    for group, options in own.items():
        schema[group] = plugin_defaults(group, _reader(group, options["name"]))
    config = OmegaConf.merge(schema, defaults, {key: value for key, value in saved.items() if key not in PLUGINS})
    assert isinstance(config, DictConfig)
    for group, options in own.items():
        apart = {key: value for key, value in options.items() if not _follows(config[group], key, value)}
        config[group] = OmegaConf.merge(config[group], apart)
    return config


def _follows(options: DictConfig, key: str, value: Any) -> bool:
    """Whether an option refers to a key of the run that has this value."""
    if key not in options or not OmegaConf.is_interpolation(options, key):
        return False
    followed = options[key]
    return bool((OmegaConf.to_container(followed) if OmegaConf.is_config(followed) else followed) == value)


def _saved_options(group: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A plug-in's options in config.yaml. Earlier versions stored the options of all plug-ins of a group: empty ones
    that this plug-in does not have are dropped. Raises ValueError."""
    options = saved.get(group)
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ValueError(f"{group} should have a name and options")
    known = ["name", *option_names(group, _reader(group, options["name"]))]
    return {key: value for key, value in options.items() if key in known or value}


def _reader(group: str, name: str) -> str:
    """The plug-in that reads the options of this one: itself, unless it was removed."""
    return READ_AS.get(f"{group}={name}", name)


def read_plain(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """An object of this plain dataclass, from the fields in `content`. Raises ValueError for a field that is missing or
    of another type."""
    known = {item.name: content[item.name] for item in fields(kind) if item.name in content}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), known))
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error, [])) from error
