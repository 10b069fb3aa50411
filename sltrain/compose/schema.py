"""What can be set: the schema of each command, its config groups, and the options of each plug-in."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sltrain.config import TrainConfig
from sltrain.config_checks import validate
from sltrain.data.sources.base import SOURCES
from sltrain.methods.base import METHODS
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.registry import Registry

# The config groups that are plug-ins.
PLUGINS: dict[str, Registry[Any]] = {"method": METHODS, "optimizer": OPTIMIZERS, "data": SOURCES}

logger = logging.getLogger(__name__)
NO_GROUPS = ("hydra", "study")  # folders of conf/ that hold something else
SCHEMA = "_schema"  # the end of the names under which Hydra knows schemas


@dataclass(frozen=True)
class Schema:
    """The configuration of one command: conf/NAME.yaml over a dataclass."""

    name: str  # the command is sltrain-NAME
    type: type
    validate: Callable[[Any], None]  # raises ValueError
    has_groups: bool  # whether the folders of conf/ are groups of options of this command, and Hydra runs it
    order: str  # printed above the keys by `--help`
    advice: str  # how to set a mandatory key that nothing sets
    open_mappings: tuple[str, ...] = ()  # keys that hold a mapping with names of the user's choice


TRAIN = Schema(
    "train",
    TrainConfig,
    validate,
    has_groups=True,
    order="a model sets its recipe over them, what you type comes last",
    advice="choose a model (model=llama_60m), or an experiment (experiment=quickstart)",
    open_mappings=("lr_scale", "rank_overrides", "sparsity_overrides"),
)


def conf_dir() -> Path:
    """The folder of configuration files: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Register with Hydra the schema that conf/train.yaml starts from, and the schema that each plug-in's file in conf/
    starts from, unless they are there. A plug-in of another package has no file there: its defaults are registered as
    the option itself."""
    store = ConfigStore.instance()
    if _registered(store.repo, "train_schema") is not TrainConfig:
        store.store(name="train_schema", node=train_schema())
    for group, registry in PLUGINS.items():
        for name in registry.names():
            if registry.is_built_in(name):
                if _registered(store.repo.get(group, {}), f"{name}{SCHEMA}") is not registry.load(name):
                    store.store(group=group, name=f"{name}{SCHEMA}", node=_plugin_schema(group, name))
                continue
            try:
                store.store(group=group, name=name, node=plugin_defaults(group, name))
            except Exception:  # another package's mistake is reported only to whoever chooses it: `missing_option`
                logger.debug(f"{group}={name} cannot be used", exc_info=True)


def _registered(options: Mapping[str, Any], name: str) -> type | None:
    """The class whose schema Hydra knows under this name. To make a schema takes longer than to compose by it."""
    option = options.get(f"{name}.yaml")
    return None if option is None else OmegaConf.get_type(option.node)


def train_schema() -> DictConfig:
    schema = OmegaConf.structured(TrainConfig)
    for key in TRAIN.open_mappings:
        OmegaConf.set_struct(schema[key], False)
    return schema


def _plugin_schema(group: str, name: str) -> DictConfig:
    schema = OmegaConf.structured(PLUGINS[group].load(name))
    for key in schema:
        if isinstance(schema._get_node(key), DictConfig):  # a mapping with names of the user's choice
            OmegaConf.set_struct(schema._get_node(key), False)
    return schema


def plugin_defaults(group: str, name: str) -> DictConfig:
    """A plug-in's schema with its defaults, whose `${...}` refer to the keys of a run. Raises ValueError for an unknown
    name."""
    registry = PLUGINS[group]
    schema = _plugin_schema(group, name)
    file = conf_dir() / group / f"{name}.yaml" if registry.is_built_in(name) else registry.defaults_file(name)
    own = {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    own.pop("defaults", None)
    defaults = OmegaConf.merge(schema, {"name": name}, own)
    assert isinstance(defaults, DictConfig)
    return defaults


def defaults_of(schema: Schema) -> dict[str, Any]:
    """Every key of a command at the top with its default, `???` where there is none; groups as they are in the schema,
    and `${...}` as it is written."""
    file = OmegaConf.load(conf_dir() / f"{schema.name}.yaml")
    assert isinstance(file, DictConfig)
    own = {key: value for key, value in file.items_ex(resolve=False) if key in _keys(schema.type)}
    return _plain(OmegaConf.merge(OmegaConf.structured(schema.type), own))


def option_defaults(group: str, name: str) -> dict[str, Any]:
    """The options of a plug-in with their defaults, as `defaults_of`. Raises ValueError for one that cannot be
    imported."""
    return {key: value for key, value in _plain(plugin_defaults(group, name)).items() if key != "name"}


def _plain(config: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def option_names(group: str, name: str) -> list[str]:
    """The options of a plug-in; none of one that cannot be imported."""
    try:
        return [item.name for item in fields(PLUGINS[group].load(name)) if item.name != "name"]
    except ValueError:
        return []


def known_keys(schema: Schema) -> list[str]:
    """Every key that a command takes, those of all plug-ins included."""
    keys = _keys(schema.type)
    if schema is TRAIN:
        for group, registry in PLUGINS.items():
            options = {option for name in registry.names() for option in option_names(group, name)}
            keys += [f"{group}.{option}" for option in sorted(options)]
    return keys


def groups_of(schema: Schema) -> dict[str, list[str]]:
    """A command's config groups and their options, as files lie in conf/."""
    if not schema.has_groups:
        return {}
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir() and path.name not in NO_GROUPS)
    options = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return options | {group: sorted({*options[group], *registry.names()}) for group, registry in PLUGINS.items()}


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass schema."""
    hints = get_type_hints(schema)
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += _keys(hints[item.name], f"{prefix}{item.name}.")
    return keys
