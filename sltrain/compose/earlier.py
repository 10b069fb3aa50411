"""What is typed over the configuration of an earlier run.

    sltrain-train model=llama_60m rank=64             conf/, see typed.py
    sltrain-train run_dir=RUN [keep_last=5]           RUN/config.yaml: the run in that folder continues
    sltrain-train init_from=RUN [max_steps=500 ...]   RUN/config.yaml too: a new run, from the weights of that one

The two later forms hold where neither a model nor an experiment is typed, and what is typed comes last in all of them.
Where a run continues, runs/run_folder.py refuses a key that may not change.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.compose.saved import read_config, read_saved
from sltrain.compose.schema import PLUGINS, TRAIN, conf_dir, groups_of, plugin_defaults, train_schema
from sltrain.compose.typed import check_form, compose_config, implied, parse_overrides, to_train_config
from sltrain.compose.wording import composition_error, refuse_unknown_key, removed_option
from sltrain.config import TrainConfig, folder_of
from sltrain.config_checks import validate

CONFIG_FILE = "config.yaml"
# What a new run does not take over from the run whose weights it starts from.
FORGOTTEN: dict[str, Any] = {"run_dir": None, "resume": "auto", "extend": 0, "tokenizer": "auto", "support_from": None}
CORPUS_KEYS = ("path", "repo", "config", "split")  # of the source in that run: another source does not read them


def run_config(texts: list[str]) -> TrainConfig:
    """The checked configuration of the run that these overrides ask for, in any of the three forms. Raises
    ValueError."""
    config = earlier_run_config(texts)
    return compose_config(texts, TRAIN) if config is None else config


def earlier_run_config(texts: list[str]) -> TrainConfig | None:
    """The configuration over that of an earlier run; None if the overrides name no such run. Raises ValueError."""
    overrides = parse_overrides(texts)
    if any(override.key_or_group in ("model", "experiment") for override in overrides):
        return None
    run_dir, init_from = _typed(overrides, "run_dir"), _typed(overrides, "init_from")
    if run_dir is not None and (file := Path(run_dir).expanduser() / CONFIG_FILE).is_file():
        return _config_over(file, overrides, {})
    if init_from is not None and (file := folder_of(init_from) / CONFIG_FILE).is_file():
        return _config_over(file, overrides, FORGOTTEN)
    if init_from is not None:
        raise ValueError(_no_weights_of_a_run(init_from))
    if run_dir is not None:
        raise ValueError(_no_run(Path(run_dir).expanduser()))
    return None


def _config_over(path: Path, overrides: list[Override], forgotten: Mapping[str, Any]) -> TrainConfig:
    """The checked configuration in a run's config.yaml with `forgotten` and then what is typed over it. What was
    settled for the corpus of that run, such as its commit, stays only if the corpus does."""
    before = read_config(path)  # first: what is wrong there is not what was typed
    earlier = before.data
    check_form(overrides, is_sweep=False, schema=TRAIN)
    for override in overrides:
        refuse_unknown_key(override, TRAIN)
    if (recipe := _typed(overrides, "recipe")) is not None:
        raise ValueError(
            f"recipe={recipe} is for a run that takes its keys from a model, and this one takes those of {path.parent};"
            f" add model=NAME, or drop it and type what conf/recipe/{recipe}.yaml sets"
        )
    _refuse_removed(path.parent, before, overrides)
    groups, config = groups_of(TRAIN), read_saved(path)
    config.update(forgotten)
    if config.support == "topk" and config.support_from is None:  # positions that were chosen come with the weights
        config.support = "uniform"
    config.data.update(dict.fromkeys(earlier.SETTLED))
    if _typed(overrides, "data") not in (None, earlier.name):
        config.update(dict.fromkeys(CORPUS_KEYS))
    if earlier.name != "mix":
        overrides = [*parse_overrides(implied([str(override.input_line) for override in overrides])), *overrides]
    try:
        for override in sorted(overrides, key=lambda override: override.key_or_group not in groups):
            key, value = override.key_or_group, override.value()
            if key in groups:
                config[key] = _chosen_option(key, str(value), groups[key])
            elif not key.startswith("hydra"):
                OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error, [override.input_line or "" for override in overrides])) from error
    result = to_train_config(config)
    result.data.adopt(earlier)
    validate(result)
    return result


def _refuse_removed(run: Path, config: TrainConfig, overrides: list[Override]) -> None:
    """Raise ValueError for a run with a plug-in that does not exist any more, unless another one is typed: its weights
    can be opened, but it cannot continue."""
    for group in PLUGINS:
        gone = removed_option(group, getattr(config, group).name)
        if gone and _typed(overrides, group) is None:
            raise ValueError(f"{run} cannot continue, its weights can start a new run (init_from={run}): {gone}")


def _chosen_option(group: str, name: str, names: list[str]) -> Any:
    """What GROUP=NAME puts in the place of the group. Raises ValueError."""
    if gone := removed_option(group, name):
        raise ValueError(gone)
    if name not in names:
        raise ValueError(f"{group}={name} does not exist; there are: {', '.join(names)}")
    if group in PLUGINS:
        return plugin_defaults(group, name)
    return OmegaConf.merge(train_schema()[group], OmegaConf.load(conf_dir() / group / f"{name}.yaml"))


def _typed(overrides: list[Override], key: str) -> str | None:
    values = [override.value() for override in overrides if override.key_or_group == key]
    return str(values[-1]) if values and values[-1] else None


def _no_weights_of_a_run(init_from: str) -> str:
    """Why init_from without a model brings no keys."""
    folder = folder_of(init_from)
    if not folder.exists():
        return f"init_from={init_from}: there is no such folder here"
    if not folder.is_dir():
        return f"init_from={init_from} is a file; name the folder of a run, of an export or of transformers"
    return (
        f"init_from={init_from} holds no run, whose keys a new one could take; if these are weights, add model=NAME of"
        f" their shape ({', '.join(groups_of(TRAIN)['model'])})"
    )


def _no_run(folder: Path) -> str:
    if (folder / "multirun.yaml").is_file():
        return f"run_dir={folder} holds a sweep; continue it with -m: sltrain-train -m run_dir={folder}"
    if folder.is_file():
        return f"run_dir={folder} is a file; choose a folder"
    models = ", ".join(groups_of(TRAIN)["model"])
    return (
        f"run_dir={folder} holds no run to continue; to begin one there, choose a model: add model=NAME ({models}),"
        " or experiment=quickstart"
    )
