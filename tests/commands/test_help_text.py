"""`--help` lists every key with the default that a configuration gets, and every plug-in's options with theirs."""

from dataclasses import fields

import pytest

from sltrain.commands.help_text import help_text
from sltrain.compose import PLUGINS, TRAIN, compose_config, option_defaults
from sltrain.config import TrainConfig

SET_BY_A_MODEL = {"rank", "alpha", "sparsity", "lr", "warmup_steps", "global_batch_size", "micro_batch_size"}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return [line.strip() for line in help_text(TRAIN).splitlines()]


def shown(lines: list[str], key: str) -> str | None:
    """What stands behind KEY= at the top, None for a key alone."""
    end = next(i for i, line in enumerate(lines) if line.startswith("Options by"))
    found = [line.split()[0] for line in lines[:end] if line.split()[:1] and line.split()[0].partition("=")[0] == key]
    assert len(found) == 1, key
    return found[0].partition("=")[2] if "=" in found[0] else None


def test_defaults_are_those_of_a_composed_run(lines: list[str]) -> None:
    """llama_tiny sets what a model sets; everything else has the value that is shown."""
    config = compose_config(["model=llama_tiny", "max_steps=null", "max_tokens=1"], TRAIN)
    plain = {True: "true", False: "false", None: "null"}
    groups = {"model", "method", "optimizer", "data", "parallel", "parametrization", "tracker"}
    for key in {item.name for item in fields(TrainConfig)} - groups - {"max_tokens", "tokenizer"}:
        value = getattr(config, key)
        if key in SET_BY_A_MODEL:
            assert shown(lines, key) is None
        elif value in ({}, []):
            assert shown(lines, key) == str(value)
        elif isinstance(value, bool) or value is None:
            assert shown(lines, key) == plain[value], key
        elif isinstance(value, str):
            assert shown(lines, key) == value, key
        else:
            text = shown(lines, key)
            assert text is not None and float(text) == value, key
    assert shown(lines, "tokenizer") == "auto"


@pytest.mark.parametrize("group", PLUGINS)
def test_options_have_their_defaults(group: str, lines: list[str]) -> None:
    """Each option that is no key of a run is shown under its plug-in, as KEY=DEFAULT if it has one."""
    keys = {item.name for item in fields(TrainConfig)}
    for name in PLUGINS[group].names():
        if not PLUGINS[group].is_built_in(name):
            continue
        start = next(i for i, line in enumerate(lines) if line.partition(":")[0] == f"{group}={name}")
        own = [key for key in option_defaults(group, name) if key not in keys]
        for key, line in zip(own, lines[start + 1 :], strict=False):
            text, _, value = line.split()[0].partition("=")
            default = option_defaults(group, name)[key]
            assert text == key and (value != "") == (default not in ("???", "")), (name, line)


def test_lines_stay_readable(lines: list[str]) -> None:
    assert (
        max(map(len, lines)) <= 190
        and "grad_clip=null                 global gradient norm; None: no clipping" in lines
    )
    assert any(line.startswith("update_every=200 ") for line in lines)
