"""Completion of `sltrain-train` by Tab, through Hydra: groups and their options, and keys once a model is typed.

eval "$(sltrain-train -sc install=bash)"     for this shell; or fish, zsh; in ~/.bashrc for every one
"""

import contextlib
import io
from collections.abc import Callable, Sequence

from sltrain.compose import SCHEMA

VERBS = [f"{verb}={shell}" for verb in ("install", "uninstall", "query") for shell in ("bash", "fish", "zsh")]


def complete(overrides: Sequence[str], start_hydra: Callable[[], None]) -> None:
    """Print what the shell asks for. `start_hydra` runs Hydra on the arguments of the process. Raises ValueError."""
    if len(overrides) != 1 or overrides[0] not in VERBS:
        raise ValueError(f"--shell-completion takes one of {', '.join(VERBS)}")
    if not overrides[0].startswith("query"):
        start_hydra()
        return
    words, errors = io.StringIO(), io.StringIO()  # of a line that does not compose, there is nothing to complete
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        start_hydra()
    print("\n".join(word for word in words.getvalue().split() if not word.endswith(SCHEMA)))
