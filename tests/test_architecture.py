"""The house: which part may import which, what is imported late, and that README leads to every file.

    commands -> api -> building -> {methods -> layers -> kernels, models, planning, data, optim, engine, runs} -> config

The table below is the rule: to draw a new arrow is to change it, with a reason.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sltrain"

ROOMS = (
    "parameters",
    "affine",
    "kernels",
    "layers",
    "methods",
    "models",
    "planning",
    "data",
    "optim",
    "engine",
    "runs",
)

# A part is a folder of the package, or a file at its top. Each may import itself and these.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "errors", "data", "layers", "methods", "optim"},  # what is public, imported when it is used
    "__main__": {"commands"},
    "train": {"api", "commands"},  # the name torchrun starts, and that of the function sltrain.train
    "registry": set(),
    "parameters": set(),
    "config": {"methods", "data", "optim"},  # the classes that plug-ins extend: light
    "config_checks": {"config", "methods", "optim", "parameters"},
    "log": set(),
    "events": set(),
    "streams": set(),
    "signals": set(),
    "errors": {"log", "signals", "streams"},
    "numeric": {"parameters"},
    "affine": {"parameters"},  # codes of tensors: of weights in layers, of bases in optim
    "compose": {"config", "config_checks", "data", "log", "methods", "optim", "registry"},
    "kernels": set(),
    "layers": {"affine", "kernels", "numeric", "parameters", "registry"},
    "methods": {"layers", "engine", "parameters", "registry"},
    "models": {"config", "numeric"},
    "planning": {"layers", "kernels", "models", "numeric", "parameters"},
    "data": {"log", "numeric", "registry"},
    "optim": {"affine", "numeric", "parameters", "registry"},
    "engine": {"events", "log", "numeric", "signals"},
    "runs": {"engine", "events", "config"},
    "formats": set(),
    "reporting": {"events"},  # rows, curves and notes come as plain data
    "building": {*ROOMS, "formats", "compose", "config", "events", "log"},
    "benchmarks": {"building", *ROOMS, "formats", "compose", "config", "config_checks", "numeric", "registry"},
    "api": {
        "building",
        *ROOMS,
        "formats",
        "reporting",
        "benchmarks",
        "compose",
        "config",
        "config_checks",
        "errors",
        "events",
        "log",
    },
    "commands": {
        "api",
        "benchmarks",
        "building",
        "compose",
        "config",
        "engine",
        "errors",
        "log",
        "reporting",
        "signals",
        "streams",
    },
}

# Slow to import (seconds each), or needed by few runs: only inside the function that uses them.
LATE = set("datasets bitsandbytes wandb tensorboard trackio transformers lm_eval matplotlib jinja2".split())

# Not modules of the package but files that exports copy, for transformers to run. They must import nothing of ours.
COPIED = {
    "formats/modeling_sltrain.py",
    "layers/kinds/_cola_code.py",
    "layers/kinds/_cr_net_code.py",
    "layers/kinds/_lost_code.py",
}

FORBIDDEN_OUTSIDERS = {"config.py": "torch", "config_checks.py": "torch", "optim/schedule.py": "torch"}
MAX_LOOP_LINES = 80


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in COPIED)


def part_of(path: Path) -> str:
    """The part that a file inside the package belongs to: its folder, or its own name at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_names(path: Path, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Dotted names of everything a file imports, at its top and inside functions, relative imports resolved."""
    package = ("sltrain", *path.relative_to(PACKAGE).parts[:-1])
    names = set()
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {
                f"{source}.{alias.name}" for alias in node.names
            }  # an alias may be a module: `from sltrain import building`
    return names


def walk_top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a file is imported: everything but the bodies of functions and of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from walk_top_level(node)


def test_every_arrow_is_in_the_table() -> None:
    wrong = []
    for path in modules():
        name, part = path.relative_to(PACKAGE).as_posix(), part_of(path)
        assert part in ALLOWED, f"sltrain/{name}: {part} is a new part; give it a line in ALLOWED"
        allowed = ALLOWED[part] | {part}
        for imported in sorted(imported_names(path)):
            pieces = imported.split(".")
            if pieces[0] != "sltrain":
                continue
            target = pieces[1] if len(pieces) > 1 else "__init__"
            is_part = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").exists()
            if is_part and target not in allowed:
                wrong.append(f"sltrain/{name} imports {imported}")
    assert not wrong, "arrows that are not in the table:\n" + "\n".join(wrong)


def test_only_these_take_a_whole_configuration_apart() -> None:
    """What is below building gets values, so that a start walks through one package."""
    named = {part_of(path) for path in modules() if "TrainConfig" in path.read_text()}
    assert named <= {"config", "config_checks", "compose", "building", "benchmarks", "api", "commands"}


def test_slow_libraries_are_imported_late() -> None:
    wrong = []
    for path in modules():
        names = imported_names(path, walk_top_level(ast.parse(path.read_text())))
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(names) if name.split(".")[0] in LATE]
    assert not wrong, "imported at the top of a file:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(COPIED))
def test_copied_files_import_no_module_of_the_package(name: str) -> None:
    imported = {imported.split(".")[0] for imported in imported_names(PACKAGE / name)}
    assert imported - sys.stdlib_module_names <= {"torch", "transformers"}


@pytest.mark.parametrize(("name", "outsider"), FORBIDDEN_OUTSIDERS.items())
def test_files_that_stay_light(name: str, outsider: str) -> None:
    assert outsider not in {imported.split(".")[0] for imported in imported_names(PACKAGE / name)}


def test_importing_everything_loads_no_slow_library() -> None:
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules() if path.stem != "__init__"]
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {['sltrain', *dotted]}]; "
        f"sys.exit(', '.join(sorted({LATE} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tests_run_on_as_many_threads_as_the_environment_says() -> None:
    """tests/conftest.py says one, before torch is imported, which reads it then."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_the_loop_fits_a_screen() -> None:
    num_lines = len((PACKAGE / "engine" / "loop.py").read_text().splitlines())
    assert num_lines <= MAX_LOOP_LINES, f"engine/loop.py holds the cadence only; it has {num_lines} lines"


def test_readme_leads_to_every_module() -> None:
    """The table "question -> file" of sltrain/README.md names each module as `engine/step.py`, or plug-ins together as
    `methods/NAME.py`."""
    rows = [line for line in (PACKAGE / "README.md").read_text().splitlines() if line.lstrip().startswith("|")]
    named = set(re.findall(r"(?<![\w/])(?:sltrain/)?((?:\w+/)*\w+\.py)\b", "\n".join(rows)))
    paths = [path.relative_to(PACKAGE).as_posix() for path in modules() if path.stem != "__init__"]
    missing = [path for path in paths if not {path, f"{os.path.dirname(path)}/NAME.py"} & named]
    assert not missing, "modules that no question in README's table leads to:\n" + "\n".join(missing)
