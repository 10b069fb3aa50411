"""What is typed -> a checked configuration.

Hydra composes conf/ over the schema. Its own errors are tracebacks, or several lines about its grammar, so a command
composes once here before Hydra runs it, and each error becomes one line (wording.py). Commands without config groups
read the same grammar, and their file in conf/, without Hydra.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.compose.schema import TRAIN, Schema, conf_dir, plugin_defaults, register_schema
from sltrain.compose.wording import composition_error, missing_option, refuse_unknown_key
from sltrain.config import TrainConfig, default_tokenizer
from sltrain.config_checks import validate


def compose_config(texts: list[str], schema: Schema) -> Any:
    """The checked configuration of a command for these overrides, an object of the schema's type. Raises ValueError."""
    if schema is TRAIN:
        register_schema()
        texts = [*implied(texts), *texts]
    overrides = parse_overrides(texts)
    check_form(overrides, is_sweep=False, schema=schema)
    with _hydra():
        for override in overrides:
            refuse_unknown_key(override, schema)
        config = to_config(_compose(texts, schema), schema)
    schema.validate(config)
    return config


def check_overrides(texts: list[str], is_sweep: bool = False) -> None:
    """Raise ValueError, before anything starts, for overrides of `sltrain-train` that do not compose to a valid
    configuration, in any combination of a sweep."""
    overrides = parse_overrides([*implied(texts), *texts])
    check_form(overrides, is_sweep, TRAIN)
    with _hydra():
        for override in overrides:
            refuse_unknown_key(override, TRAIN)
        for combination in itertools.product(*(sweep_values(override) for override in overrides)):
            validate(to_train_config(_compose(list(combination), TRAIN)))


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
            if re.search(r"\s[\w.]+=", value):
                raise ValueError(f"{text!r} holds several keys in one argument; type each as an argument") from error
            if value.startswith("{"):
                raise ValueError(
                    f"cannot parse {text!r}; write a mapping with bare names: '{key}={{q_proj:64}}'"
                ) from error
            quoted = value.replace('"', '\\"')
            raise ValueError(
                f"cannot parse {text!r}; quote the value for both the shell and Hydra: '{key}=\"{quoted}\"'"
            ) from error
    return parsed


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


def check_form(overrides: list[Override], is_sweep: bool, schema: Schema) -> None:
    """Raise ValueError for overrides that remove a key, or list values where there is no sweep."""
    for override in overrides:
        if override.key_or_group == "hydra/launcher" and not is_sweep:
            raise ValueError(f"{override.input_line} is for sweeps; add -m, or drop it")
        if override.is_delete():
            raise ValueError(f"{override.input_line!r}: keys cannot be removed; set another value")
        if override.is_sweep_override() and not is_sweep:
            text = override.input_line
            hint = "a sweep needs -m" if schema is TRAIN else "one is needed"
            raise ValueError(f"{text!r} lists several values: {hint}; one value with commas needs quotes")


@contextmanager
def _hydra() -> Iterator[None]:
    """Let Hydra compose our files, also inside a program that is itself a Hydra application."""
    of_caller, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = of_caller


def _compose(overrides: list[str], schema: Schema) -> DictConfig:
    try:
        return compose(schema.name, overrides) if schema.has_groups else _merge(overrides, schema)
    except MissingConfigException as error:
        raise ValueError(missing_option(error)) from error
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise ValueError(composition_error(error, overrides)) from error


def _merge(overrides: list[str], schema: Schema) -> DictConfig:
    """The schema, the command's file, and what was typed, each over the one before."""
    config = OmegaConf.merge(OmegaConf.structured(schema.type), OmegaConf.load(conf_dir() / f"{schema.name}.yaml"))
    assert isinstance(config, DictConfig)
    for override in parse_overrides(overrides):
        OmegaConf.update(config, override.key_or_group, override.value())
    return config


def to_config(config: DictConfig, schema: Schema) -> Any:
    """The composed configuration as plain dataclasses. Raises ValueError for a mandatory key that nothing sets."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"{missing[0]} is not set; {schema.advice}")
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error, [])) from error
    assert isinstance(result, schema.type)
    if isinstance(result, TrainConfig):
        result.data.complete(partial(_inner_source, config))
    if isinstance(result, TrainConfig) and result.tokenizer == "auto":
        result.tokenizer = result.data.own_tokenizer() or default_tokenizer(result.init_from)
    return result


def _inner_source(config: DictConfig, name: str, options: Mapping[str, Any]) -> Any:
    """What data=NAME with these options would be in this configuration, for a source that is made of others."""
    try:
        root = config.copy()  # whose keys the defaults refer to
        root.data = OmegaConf.merge(plugin_defaults("data", name), options)
        return OmegaConf.to_object(root.data)
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error, [])) from error


def implied(texts: list[str]) -> list[str]:
    """What these overrides mean besides: data=mix where data.mix is set and no source is chosen. Raises ValueError."""
    keys = [override.key_or_group for override in parse_overrides(texts)]
    is_mix = any(key.split(".")[:2] == ["data", "mix"] for key in keys)
    return ["data=mix"] if is_mix and "data" not in keys else []


def to_train_config(config: DictConfig) -> TrainConfig:
    """`to_config` of `sltrain-train`."""
    return to_config(config, TRAIN)


def with_plugin(config: TrainConfig, group: str, name: str) -> TrainConfig:
    """The configuration with `GROUP=NAME` in place of what it has there, at its defaults. Raises ValueError for an
    unknown name."""
    root = OmegaConf.create({key: value for key, value in asdict(config).items() if key != group})
    root[group] = plugin_defaults(group, name)
    chosen: Any = {group: OmegaConf.to_object(root[group])}
    return replace(config, **chosen)
