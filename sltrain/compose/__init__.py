"""What is typed, and what a run folder holds -> checked configurations."""

from sltrain.compose.earlier import earlier_run_config, run_config
from sltrain.compose.saved import read_config, read_plain
from sltrain.compose.schema import (
    PLUGINS,
    SCHEMA,
    TRAIN,
    Schema,
    conf_dir,
    defaults_of,
    groups_of,
    option_defaults,
    register_schema,
)
from sltrain.compose.typed import (
    check_overrides,
    compose_config,
    implied,
    parse_overrides,
    sweep_values,
    to_config,
    to_train_config,
    with_plugin,
)
from sltrain.compose.wording import refuse_flags

__all__ = [
    "PLUGINS",
    "SCHEMA",
    "TRAIN",
    "Schema",
    "check_overrides",
    "compose_config",
    "conf_dir",
    "defaults_of",
    "earlier_run_config",
    "groups_of",
    "implied",
    "option_defaults",
    "parse_overrides",
    "read_config",
    "read_plain",
    "refuse_flags",
    "register_schema",
    "run_config",
    "sweep_values",
    "to_config",
    "to_train_config",
    "with_plugin",
]
