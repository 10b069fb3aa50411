"""README's commands are the ones that CI runs, and everything it shows exists."""

import re
from pathlib import Path

import pytest

from sltrain.bench import read_arguments
from sltrain.compose import check_overrides, register_schema

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [
        text
        for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        if name == language
    ]


def test_ci_runs_the_two_commands_word_for_word() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in blocks("bash")[:2]:
        assert command.strip() in script


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if "sltrain" in line])
def test_commands_compose(line: str) -> None:
    """Every command in README has overrides that compose."""
    if "sltrain-bench" in line:
        read_arguments(line.partition(" #")[0].partition("sltrain-bench")[2].split())
        return
    if not re.search(r"sltrain-train|sltrain\.train|launch/", line):
        pytest.skip("no training command")
    register_schema()
    words = re.split(r"sltrain-train|sltrain\.train|\.sh|\.sbatch", line.partition(" #")[0])[-1].split()
    check_overrides([word.strip("'\"") for word in words if "=" in word], is_sweep=" -m " in line)


def test_paths_exist() -> None:
    for path in re.findall(r"`((?:sltrain|conf|launch|tests)/[\w/.]*\w)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_shown_output_is_real() -> None:
    training, tests = blocks("")
    assert "final evaluation" in training and re.search(r"\d+ passed", tests)
