"""Names of other trainers lead to keys that exist, and never to a key's place."""

import re

import pytest

from sltrain.compose import TRAIN, check_overrides, compose_config, groups_of, register_schema
from sltrain.compose.other_names import OTHER_NAMES, OTHERS
from sltrain.compose.schema import known_keys

KNOWN = {*known_keys(TRAIN), *groups_of(TRAIN)}


def test_no_name_is_a_key_and_every_answer_names_keys() -> None:
    assert not KNOWN & OTHER_NAMES.keys()
    assert len(OTHER_NAMES) == sum(len(names.split()) for names in OTHERS.values()), "a name stands in two rows"
    for ours in OTHERS:
        keys = {ours.split()[0].partition("=")[0].rstrip(",:"), *re.findall(r"[\w.]+(?==)|[\w.]*\w_\w+", ours)}
        assert keys <= KNOWN, ours


def refusal(*overrides: str) -> str:
    register_schema()
    with pytest.raises(ValueError) as error:
        check_overrides(["model=llama_60m", *overrides])
    return str(error.value)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("learning_rate=1e-3", "lr"),
        ("weight-decay=0.1", "weight_decay"),
        ("optimizer.lr=1e-3", "lr"),
        ("training.max_steps=5", "max_steps"),
        ("training.steps=5", "max_steps"),
        ("RANK=64", "rank"),
        ("Learning-Rate=1", "lr"),
        ("delta=0.03", "sparsity"),
        ("r=8", "rank"),
        ("bf16=true", "dtype=bfloat16"),
        ("+learning_rate=1e-3", "lr"),
    ],
)
def test_the_answer(typed: str, ours: str) -> None:
    key = typed.lstrip("+").partition("=")[0]
    assert refusal(typed) == f"unknown key {key!r}; here it is {ours}"
    composed = ours if "=" in ours else f"{ours}={typed.partition('=')[2]}"
    compose_config(["model=llama_60m", composed], TRAIN)
