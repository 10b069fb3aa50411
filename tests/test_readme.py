"""README's commands are the ones that CI runs, and everything that the README files show exists."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from sltrain.api.plan import build_plan
from sltrain.api.plan_config import read_arguments as read_plan_arguments
from sltrain.api.plan_config import split_arguments
from sltrain.api.study_file import COMPARE, CompareConfig, path_of_study
from sltrain.benchmarks.settings import read_arguments
from sltrain.commands import evaluate, export, generate, report
from sltrain.compose import check_overrides, compose_config, register_schema

FLAGS = {
    "report": report.arguments_parser,
    "export": export.arguments_parser,
    "eval": evaluate.arguments_parser,
    "generate": generate.arguments_parser,
}
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = ("conf", "launch", "sltrain", "tests")
PAGES = [README, *(page.read_text() for folder in FOLDERS for page in sorted((ROOT / folder).rglob("README.md")))]


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def test_ci_runs_the_two_commands_word_for_word() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in blocks("bash")[:2]:
        assert command.strip() in script


SHOWN = {line for page in PAGES for block in blocks("bash", page) for line in block.splitlines() if "sltrain" in line}


@pytest.mark.parametrize("line", sorted(SHOWN))
def test_commands_compose(line: str) -> None:
    """Every command shown has overrides that compose."""
    if "sltrain-bench" in line:
        read_arguments(line.partition(" #")[0].partition("sltrain-bench")[2].split())
        return
    if "sltrain-plan" in line:
        read_plan_arguments(line.partition(" #")[0].partition("sltrain-plan")[2].split())
        return
    if "sltrain-compare" in line:
        own, _ = split_arguments(
            line.partition(" #")[0].partition("sltrain-compare")[2].split(), asdict(CompareConfig())
        )
        assert path_of_study(compose_config(own, COMPARE).study).exists()
        return
    if flags := re.search(r"sltrain-(report|export|eval|generate) (.*)", line.partition(" #")[0]):
        typed = FLAGS[flags[1]]().parse_args(shlex.split(flags[2]))
        assert typed
        return
    if not re.search(r"sltrain-train|sltrain\.train|launch/", line):
        pytest.skip("no training command")
    register_schema()
    words = re.split(r"sltrain-train|sltrain\.train|\.sh|\.sbatch", line.partition(" #")[0])[-1].split()
    overrides = [word.strip("'\"") for word in words if "=" in word]
    if overrides[0].startswith(("run_dir=", "init_from=")):  # its folder knows the model
        overrides.append("model=llama_tiny")
    check_overrides(overrides, is_sweep=" -m " in line)


def test_the_memory_table_is_what_its_commands_print() -> None:
    """The planned figure of each row, by the command in it. No GPU is needed for a plan."""
    head = "sltrain-plan optimizer=adam8bit per_layer_update=true"
    page = (ROOT / "sltrain" / "planning" / "README.md").read_text()
    section = page.partition(head)[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "GB" not in line]
    rows = [row for row in rows if len(row) == 6 and row[1].startswith("**")]
    assert len(rows) == 6
    command = ""
    for _, planned, galore, dense, _, cell in rows:
        typed = cell.strip("`")
        command = command + typed.removeprefix("...") if typed.startswith("...") else typed
        kind = [] if "optimizer=" in command else ["optimizer=adam8bit"]
        plan = build_plan(*read_plan_arguments([*command.split(), *kind, "per_layer_update=true"]))
        columns = {column.name: column for column in plan.columns}
        names = ("this run", "method=full optimizer=galore", "method=full")
        for figure, name in zip((planned.strip("*"), galore, dense), names, strict=True):
            assert figure == f"{columns[name].total_bytes / 1e9:.2f}", (command, name)


def test_paths_exist() -> None:
    for path in re.findall(r"(?:`|\]\()((?:sltrain|conf|launch|tests|outputs/example)/[\w/.]*\w)(?:`|\))", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
