"""Overrides -> checked configuration: Hydra composes conf/ over the schema.

Hydra's own errors are tracebacks, or several lines about its grammar. This module composes once before Hydra runs the
command and turns each error into one line that names the key and the nearest valid spelling. Commands differ by their
`Schema`. Commands without config groups read the same grammar, and their file in conf/, without Hydra.
"""

import difflib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.config import RETIRED_KEYS, TrainConfig, validate
from sltrain.data.sources.base import SOURCES
from sltrain.errors import first_line
from sltrain.methods.base import METHODS
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.registry import Registry

# The config groups that are plug-ins.
PLUGINS: dict[str, Registry[Any]] = {"method": METHODS, "optimizer": OPTIMIZERS, "data": SOURCES}

logger = logging.getLogger(__name__)
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
    order="a model sets its recipe, conf/train.yaml the protocol, what you type comes last",
    advice="choose a model (model=llama_60m), or an experiment (experiment=quickstart)",
    open_mappings=("rank_overrides", "sparsity_overrides"),
)


def conf_dir() -> Path:
    """The folder of configuration files: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Register with Hydra the schema that conf/train.yaml starts from, and the schema that each plug-in's file in conf/
    starts from. A plug-in of another package has no file there: its defaults are registered as the option itself."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=_train_schema())
    for group, registry in PLUGINS.items():
        for name in registry.names():
            if registry.is_built_in(name):
                store.store(group=group, name=f"{name}{SCHEMA}", node=_plugin_schema(group, name))
                continue
            try:
                store.store(group=group, name=name, node=_plugin_defaults(group, name))
            except Exception:  # another package's mistake is reported only to whoever chooses it: `_missing_option`
                logger.debug(f"{group}={name} cannot be used", exc_info=True)


def _train_schema() -> DictConfig:
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


def _plugin_defaults(group: str, name: str) -> DictConfig:
    """A plug-in's schema with its defaults, whose `${...}` refer to the keys of a run. Raises ValueError for an unknown
    name."""
    registry = PLUGINS[group]
    schema = _plugin_schema(group, name)
    file = conf_dir() / group / f"{name}.yaml" if registry.is_built_in(name) else registry.defaults_file(name)
    own = {} if file is None else yaml.safe_load(file.read_text()) or {}
    own.pop("defaults", None)
    defaults = OmegaConf.merge(schema, {"name": name}, own)
    assert isinstance(defaults, DictConfig)
    return defaults


def with_plugin(config: TrainConfig, group: str, name: str) -> TrainConfig:
    """The configuration with `GROUP=NAME` in place of what it has there, at its defaults. Raises ValueError for an
    unknown name."""
    root = OmegaConf.create({key: value for key, value in asdict(config).items() if key != group})
    root[group] = _plugin_defaults(group, name)
    chosen: Any = {group: OmegaConf.to_object(root[group])}
    return replace(config, **chosen)


def to_config(config: DictConfig, schema: Schema) -> Any:
    """The composed configuration as plain dataclasses. Raises ValueError for a mandatory key that nothing sets."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} is not set; {schema.advice}")
    result = OmegaConf.to_object(config)
    assert isinstance(result, schema.type)
    return result


def to_train_config(config: DictConfig) -> TrainConfig:
    """`to_config` of `sltrain-train`."""
    return to_config(config, TRAIN)


def read_config(path: Path) -> TrainConfig:
    """The checked configuration in a run's config.yaml. A key that did not exist when the run was made gets its default
    from conf/train.yaml; RETIRED_KEYS are dropped. Raises ValueError."""
    schema = _train_schema()
    names = {key.name for key in fields(TrainConfig)}
    defaults = {key: value for key, value in OmegaConf.load(conf_dir() / "train.yaml").items() if key in names}
    text = path.read_bytes()
    try:
        saved = yaml.safe_load(text)
        if not isinstance(saved, dict):
            raise ValueError("it should map keys to values")
        saved = {key: value for key, value in saved.items() if key not in RETIRED_KEYS}
        for group in PLUGINS:
            saved[group] = _saved_options(group, saved)
            schema[group] = _plugin_defaults(group, saved[group]["name"])
        config = OmegaConf.merge(schema, defaults, saved)
        assert isinstance(config, DictConfig)
        result = to_train_config(config)
        validate(result)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        reason = _composition_error(error, []) if isinstance(error, OmegaConfBaseException) else first_line(error)
        raise ValueError(f"{path} is damaged, or of another version: {reason}") from error
    return result


def _saved_options(group: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A plug-in's options in config.yaml. Earlier versions stored the options of all plug-ins of a group: empty ones
    that this plug-in does not have are dropped. Raises ValueError."""
    options = saved.get(group)
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ValueError(f"{group} should have a name and options")
    known = ["name", *option_names(group, options["name"])]
    return {key: value for key, value in options.items() if key in known or value}


def read_plain(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """An object of this plain dataclass, from the fields in `content`. Raises ValueError for a field that is missing or
    of another type."""
    known = {item.name: content[item.name] for item in fields(kind) if item.name in content}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), known))
    except OmegaConfBaseException as error:
        raise ValueError(_composition_error(error, [])) from error


def compose_config(texts: list[str], schema: Schema) -> Any:
    """The checked configuration of a command for these overrides, an object of the schema's type. Raises ValueError."""
    if schema is TRAIN:
        register_schema()
    overrides = parse_overrides(texts)
    _check_form(overrides, is_sweep=False, schema=schema)
    with _hydra():
        for override in overrides:
            _check_key(override, schema)
        config = to_config(_compose(texts, schema), schema)
    schema.validate(config)
    return config


@contextmanager
def _hydra() -> Iterator[None]:
    """Let Hydra compose our files, also inside a program that is itself a Hydra application."""
    of_caller, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = of_caller


def parse_overrides(texts: list[str]) -> list[Override]:
    """Parse command-line overrides. Raises ValueError for text that Hydra's grammar refuses, showing the quoted
    form."""
    parsed = []
    for text in texts:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except (OverrideParseException, HydraException) as error:
            key, separator, value = text.partition("=")
            if not separator:
                raise ValueError(f"{text!r} is not of the form key=value") from error
            if value.startswith("{"):
                raise ValueError(
                    f"cannot parse {text!r}; write a mapping with bare names: '{key}={{q_proj:64}}'"
                ) from error
            quoted = value.replace('"', '\\"')
            raise ValueError(
                f"cannot parse {text!r}; quote the value for both the shell and Hydra: '{key}=\"{quoted}\"'"
            ) from error
    return parsed


def check_overrides(texts: list[str], is_sweep: bool = False) -> None:
    """Raise ValueError, before anything starts, for overrides of `sltrain-train` that do not compose to a valid
    configuration, in any combination of a sweep."""
    overrides = parse_overrides(texts)
    _check_form(overrides, is_sweep, TRAIN)
    with _hydra():
        for override in overrides:
            _check_key(override, TRAIN)
        for combination in itertools.product(*(sweep_values(override) for override in overrides)):
            validate(to_train_config(_compose(list(combination), TRAIN)))


def sweep_values(override: Override) -> list[str]:
    """The single-valued overrides that an override expands to: several if it sweeps, one otherwise."""
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [override.input_line]
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:  # glob() looks options up when Hydra runs, not before
        raise ValueError(
            f"cannot expand {override.input_line!r}; list the values: {override.key_or_group}=A,B"
        ) from error


def _check_form(overrides: list[Override], is_sweep: bool, schema: Schema) -> None:
    for override in overrides:
        if override.key_or_group == "hydra/launcher" and not is_sweep:
            raise ValueError(f"{override.input_line} is for sweeps; add -m, or drop it")
        if override.is_delete():
            raise ValueError(f"{override.input_line!r}: keys cannot be removed; set another value")
        if override.is_sweep_override() and not is_sweep:
            text = override.input_line
            hint = "a sweep needs -m" if schema is TRAIN else "one is needed"
            raise ValueError(f"{text!r} lists several values: {hint}; one value with commas needs quotes")


def _compose(overrides: list[str], schema: Schema) -> DictConfig:
    try:
        return compose(schema.name, overrides) if schema.has_groups else _merge(overrides, schema)
    except MissingConfigException as error:
        raise ValueError(_missing_option(error)) from error
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise ValueError(_composition_error(error, overrides)) from error


def _merge(overrides: list[str], schema: Schema) -> DictConfig:
    """The schema, the command's file, and what was typed, each over the one before."""
    config = OmegaConf.merge(OmegaConf.structured(schema.type), OmegaConf.load(conf_dir() / f"{schema.name}.yaml"))
    assert isinstance(config, DictConfig)
    for override in parse_overrides(overrides):
        OmegaConf.update(config, override.key_or_group, override.value())
    return config


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if option.startswith("submitit_"):
        return "hydra/launcher=slurm needs hydra-submitit-launcher: pip install '.[sweep]'"
    if group in PLUGINS and option in PLUGINS[group].names():
        try:
            _plugin_defaults(group, option)
        except Exception as reason:  # the plug-in is there and cannot be used
            text = first_line(reason)
            return text if text.startswith(f"{group}={option}") else f"{group}={option} cannot be used: {text}"
    options = [name for name in error.options or [] if not name.endswith(SCHEMA)]
    near = difflib.get_close_matches(option, options, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'{group}={name}' for name in near)}? " if near else ""
    return f"{group}={option} does not exist; {hint}there are: {', '.join(options)}"


def _composition_error(error: BaseException, overrides: list[str]) -> str:
    """One line for a composition error: the innermost message, and the override it belongs to."""
    text = str(error)
    if "You must specify" in text:
        options = ", ".join(groups_of(TRAIN)["model"])
        return f"no model is chosen: add model=NAME ({options}), or experiment=quickstart"
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    message = str(cause).splitlines()[0]
    if "converted to Integer" in message:
        message += " (write whole numbers out: 1_000_000)"
    if (unknown := re.match(r"Could not override '(\w+)\.([\w.]+)'", text)) and unknown[1] in PLUGINS:
        return _foreign_option(unknown[1], unknown[2], overrides)
    typed = next((o for o in reversed(overrides) if key and o.lstrip("+~").partition("=")[0] == key), None)
    return f"{typed or key}: {message}" if (typed or key) else message


def _foreign_option(group: str, option: str, overrides: list[str]) -> str:
    """Why this option cannot be set: it belongs to another plug-in than the chosen one."""
    rest = [text for text in overrides if not text.lstrip("+~").startswith(f"{group}.{option}=")]
    name = _compose(rest, TRAIN)[group]["name"]
    own = option_names(group, name)
    others = [other for other in PLUGINS[group].names() if option in option_names(group, other)]
    belongs = f"it belongs to {' and '.join(f'{group}={other}' for other in others)}; " if others else ""
    return f"{group}.{option}: {group}={name} has no such option; {belongs}it has {', '.join(own) or 'none'}"


def option_names(group: str, name: str) -> list[str]:
    """The options of a plug-in; none of one that cannot be imported."""
    try:
        return [item.name for item in fields(PLUGINS[group].load(name)) if item.name != "name"]
    except ValueError:
        return []


def _check_key(override: Override, schema: Schema) -> None:
    """Refuse a key that neither the schema nor a config group knows, with the nearest names."""
    key = override.key_or_group
    group, _, option = key.partition(".")
    if schema is TRAIN and group in PLUGINS and option == "name":
        raise ValueError(f"{key} is not set by itself: choose with {group}={override.value()}")
    groups = groups_of(schema)
    known = _keys(schema.type)
    if schema is TRAIN:
        known += [f"{group}.{key}" for group, registry in PLUGINS.items() for key in _all_options(group, registry)]
    is_hydras = schema.has_groups and (key.split(".")[0] == "hydra" or key.startswith("hydra/"))
    if is_hydras or key in groups or key in known:
        return
    if any(key.startswith(f"{name}.") for name in schema.open_mappings):
        return
    if group in PLUGINS and f"{group}.{option.partition('.')[0]}" in known:  # an entry of a mapping
        return
    near = difflib.get_close_matches(key.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sltrain-{schema.name} --help lists the keys"
    raise ValueError(f"unknown key {key!r}; {hint}")


def _all_options(group: str, registry: Registry[Any]) -> list[str]:
    return sorted({key for name in registry.names() for key in option_names(group, name)})


def groups_of(schema: Schema) -> dict[str, list[str]]:
    """A command's config groups and their options, as files lie in conf/."""
    if not schema.has_groups:
        return {}
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra")
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
