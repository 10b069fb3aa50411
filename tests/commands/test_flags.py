"""Flags: a mistake is one line, not argparse's usage and the end of the process."""

import argparse
import importlib

import pytest

from sltrain.commands.flags import make_parser

DOC = """`tool`: does a thing.

    tool a --size 3        100 % as it is
"""


def parser() -> argparse.ArgumentParser:
    made = make_parser("tool", DOC)
    made.add_argument("paths", nargs="+", metavar="PATH")
    made.add_argument("--size", type=int, default=1)
    made.add_argument("--kind", choices=("a", "b"))
    return made


def test_what_is_typed_arrives() -> None:
    typed = parser().parse_args(["x", "y", "--size", "3"])
    assert (typed.paths, typed.size, typed.kind) == (["x", "y"], 3, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["PATH"]),
        (["x", "--size", "big"], ["--size", "big"]),
        (["x", "--size"], ["--size"]),
        (["x", "--kind", "c"], ["--kind", "c", "a"]),
        (["x", "--sise", "3"], ["--sise"]),
        (["x", "--siz", "3"], ["--siz"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parser().parse_args(arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "tool --help" in message
    assert all(word in message for word in words)
    assert capsys.readouterr() == ("", "")


def test_help_shows_the_doc_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert DOC.strip() in out and "--size" in out and "PATH" in out


@pytest.mark.parametrize("name", ["export", "generate", "evaluate"])
def test_the_commands_explain_themselves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = importlib.import_module(f"sltrain.commands.{name}")
    with pytest.raises(SystemExit) as ended:
        command.run_command(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and (command.__doc__ or "nothing").strip() in out
