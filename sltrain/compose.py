"""From what a person typed to a checked configuration: Hydra composes conf/ over the schema.

Hydra's own errors are tracebacks or several lines about its grammar. This file composes once before Hydra runs the
command, and turns each of those errors into one line that names the key and the nearest valid spelling.
"""

import difflib
import inspect
import itertools
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.config import TrainConfig, validate

OPEN_MAPPINGS = ("rank_overrides", "sparsity_overrides")  # keys that hold a mapping with names of the user's choice


def conf_dir() -> Path:
    """The folder of configuration files: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Make the schema known to Hydra under the name that conf/train.yaml starts from."""
    schema = OmegaConf.structured(TrainConfig)
    for key in OPEN_MAPPINGS:
        OmegaConf.set_struct(schema[key], False)
    ConfigStore.instance().store(name="train_schema", node=schema)


def help_text() -> str:
    """What `--help` prints: the groups with their options, and every key with the comment it has in the schema."""
    lines = ["Groups (GROUP=OPTION):"]
    lines += [f"  {group:11} {', '.join(options)}" for group, options in _groups().items()]
    lines += ["", "Keys (KEY=VALUE); a model sets its recipe, conf/train.yaml the protocol, what you type comes last:"]
    for line in inspect.getsource(TrainConfig).splitlines():
        code, _, comment = line.strip().partition("  # ")
        key, separator, _ = code.partition(": ")
        if separator and key.isidentifier() and key not in _groups():
            lines.append(f"  {key:25} {comment}".rstrip())
    return "\n".join(lines)


def to_train_config(config: DictConfig) -> TrainConfig:
    """The composed configuration as plain dataclasses. Raises ValueError for a mandatory key that nothing sets."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(
            f"{missing[0]} is not set; choose a model (model=llama_60m), or an experiment (experiment=quickstart)"
        )
    result = OmegaConf.to_object(config)
    assert isinstance(result, TrainConfig)
    return result


def parse_overrides(texts: list[str]) -> list[Override]:
    """Parse command-line overrides. Raises ValueError for text that is not of Hydra's grammar, showing the quoted
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
    """Refuse, before anything starts, overrides that do not compose to a valid configuration, in every combination of a
    sweep. Raises ValueError."""
    overrides = parse_overrides(texts)
    for override in overrides:
        if override.is_delete():
            raise ValueError(f"{override.input_line!r}: keys cannot be removed; set another value")
        if override.is_sweep_override() and not is_sweep:
            text = override.input_line
            raise ValueError(f"{text!r} lists several values: a sweep needs -m; one value with commas needs quotes")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for override in overrides:
            _check_key(override)
        for combination in itertools.product(*(sweep_values(override) for override in overrides)):
            validate(to_train_config(_compose(list(combination))))


def sweep_values(override: Override) -> list[str]:
    """The overrides of single values that one override stands for: several if it sweeps, one otherwise."""
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [override.input_line]
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:  # glob() looks options up when Hydra runs, not before
        raise ValueError(
            f"cannot expand {override.input_line!r}; list the values: {override.key_or_group}=A,B"
        ) from error


def _compose(overrides: list[str]) -> DictConfig:
    try:
        return compose("train", overrides)
    except MissingConfigException as error:
        raise ValueError(_missing_option(error)) from error
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise ValueError(_composition_error(error, overrides)) from error


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = error.options or []
    near = difflib.get_close_matches(option, options, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'{group}={name}' for name in near)}? " if near else ""
    return f"{group}={option} does not exist; {hint}there are: {', '.join(options)}"


def _composition_error(error: BaseException, overrides: list[str]) -> str:
    """One line for a composition error: the innermost message, and the override it belongs to."""
    text = str(error)
    if "You must specify" in text:
        options = ", ".join(_groups()["model"])
        return f"no model is chosen: add model=NAME ({options}), or experiment=quickstart"
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    message = str(cause).splitlines()[0]
    if "converted to Integer" in message:
        message += " (write whole numbers out: 1_000_000)"
    typed = next((o for o in reversed(overrides) if key and o.lstrip("+~").partition("=")[0] == key), None)
    return f"{typed or key}: {message}" if (typed or key) else message


def _check_key(override: Override) -> None:
    """Refuse a key that neither the schema nor a config group knows, with the nearest names."""
    key = override.key_or_group
    groups = _groups()
    known = _keys(TrainConfig)
    root = key.split(".")[0]
    if root == "hydra" or key.startswith("hydra/") or key in groups or key in known:
        return
    if any(key.startswith(f"{name}.") for name in OPEN_MAPPINGS):
        return
    near = difflib.get_close_matches(key.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "sltrain-train --help lists the keys"
    raise ValueError(f"unknown key {key!r}; {hint}")


def _groups() -> dict[str, list[str]]:
    """Config groups and their options, as files lie in conf/."""
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass schema."""
    hints = get_type_hints(schema)
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += _keys(hints[item.name], f"{prefix}{item.name}.")
    return keys
