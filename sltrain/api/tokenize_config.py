"""The schema of `sltrain-tokenize`: the keys it has beside those of `sltrain-train`.

Values come from conf/tokenize.yaml and what is typed. This file imports no torch.
"""

from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from sltrain.api.plan_config import compose_run, split_arguments
from sltrain.compose import Schema, compose_config, parse_overrides
from sltrain.config import TrainConfig


@dataclass
class TokenizeConfig:
    """Where ids go, and how they get there."""

    output: Any = MISSING  # the folder to make, or to continue if an earlier call was stopped
    processes: int | None = None  # how many work at the same time; None: one for each CPU of this process


def validate(config: TokenizeConfig) -> None:
    """Check what the values alone decide. Raises ValueError naming the key, its value and what to change."""
    if not isinstance(config.output, str) or not config.output.strip():
        raise ValueError(f"output={config.output}: must be a folder, such as output=/data/tokens")
    if config.processes is not None and config.processes < 1:
        raise ValueError(f"processes={config.processes}: must be at least 1")


TOKENIZE = Schema(
    "tokenize",
    TokenizeConfig,
    validate,
    has_groups=False,
    order="of sltrain-train's keys, those of the text count: data, path, tokenizer, "
    "validation_path, on_bad_data and the options of the source",
    advice="name the folder to make: output=DIR",
)
KEYS = {item.name for item in fields(TokenizeConfig)}
ANY_MODEL = "model=llama_tiny"  # a configuration has one; ids do not depend on it


def read_arguments(arguments: list[str]) -> tuple[TokenizeConfig, TrainConfig]:
    """What is made, and the run whose text is tokenized. Raises ValueError."""
    own, others = split_arguments(arguments, KEYS, "sltrain-tokenize")
    keys = [override.key_or_group for override in parse_overrides(others)]
    if not {"model", "experiment"} & {*keys}:
        others = [ANY_MODEL, *others]
    settings, config = compose_config(own, TOKENIZE), compose_run(others)
    if config.data.name == "tokens":
        raise ValueError("data=tokens is made of ids already; name the text, as in data=local path='/data/*.json.gz'")
    if config.data.name == "mix":
        raise ValueError(
            "data=mix cannot be tokenized into one folder, where weights would be fixed; tokenize each source by itself"
            " with the same tokenizer, then mix the folders: data.mix={a:{source:tokens,path:DIR,weight:0.7},...}"
        )
    return settings, config
