"""The command that a stopped run shows is one that a shell and Hydra understand."""

import shlex
from pathlib import Path

import pytest

from sltrain.api.farewell import continuing
from sltrain.compose import parse_overrides


@pytest.mark.parametrize("folder", ["outputs/run_1", "/my wörk/it's {a}, b: $c/k 1", "a=b"])
def test_it_can_be_pasted(folder: str) -> None:
    command, override = shlex.split(continuing(Path(folder)))
    (parsed,) = parse_overrides([override])
    assert (command, parsed.key_or_group, str(parsed.value())) == ("sltrain-train", "run_dir", folder)


def test_a_plain_name_stays_plain() -> None:
    assert continuing(Path("outputs/run_1")) == "sltrain-train run_dir=outputs/run_1"
