"""`sltrain COMMAND` and `python -m sltrain COMMAND` are `sltrain-COMMAND`."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sltrain.commands import main
from sltrain.errors import ExitCode

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_alone_it_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    names = {name.removeprefix("sltrain-"): place for name, place in scripts.items() if name != "sltrain"}
    assert {name: f"sltrain.commands.{module}:main" for name, module in main.MODULES.items()} == names
    assert scripts["sltrain"] == "sltrain.commands.main:main"
    for arguments in ([], ["--help"]):
        assert main.run_command(arguments) == ExitCode.OK
        out, err = capsys.readouterr()
        listed = out.partition("Commands:\n")[2].splitlines()
        assert [line.split()[0] for line in listed] == list(main.MODULES) and not err
        assert all(len(line) < 120 and len(line.split()) > 4 for line in listed)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("plan model=llama_60m cards=[24] format=json", 0),
        ("train model=llama_60m rank=0.5", 2),
    ],
)
def test_a_command_is_the_same_under_both_names(arguments: str, code: int) -> None:
    name, *rest = arguments.split()
    both = run("sltrain", name, *rest), run(f"sltrain.commands.{name}", *rest)
    assert [(done.returncode, done.stdout, done.stderr) for done in both] == [
        (code, both[0].stdout, both[0].stderr)
    ] * 2
    assert bool(both[0].stdout) == (code == 0)


def test_a_command_that_does_not_exist() -> None:
    for typed, hint in (("trian", "did you mean train?"), ("x", "there are: train, plan, bench")):
        done = run("sltrain", typed)
        assert done.returncode == ExitCode.BAD_INPUT and done.stdout == ""
        assert done.stderr.startswith(f"error: sltrain has no command '{typed}'; {hint}")


def test_it_trains_under_torchrun(tiny: list[str], tmp_path: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = run(*torchrun, "sltrain", "train", *tiny, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"finished: {tmp_path / 'run'}"
    assert "(2 processes, " in done.stdout and done.stdout.count("run folder") == 1
