"""`sltrain`: every command under one name.

sltrain train model=llama_60m      the same as sltrain-train model=llama_60m
sltrain train --help               what it takes, with examples
"""

import difflib
import importlib
import sys
from types import ModuleType

from sltrain.errors import ExitCode, report_error, run_as_process

MODULES = {
    "train": "train",
    "plan": "plan",
    "bench": "bench",
    "report": "report",
    "eval": "evaluate",
    "generate": "generate",
    "export": "export",
    "tokenize": "tokenize",
    "compare": "compare",
}  # command -> its file in this package


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name is None or name not in MODULES:
        run_as_process(run_command)
    sys.argv = [f"sltrain-{name}", *sys.argv[2:]]
    _module(name).main()


def run_command(arguments: list[str]) -> ExitCode:
    """List the commands, or refuse one that does not exist; return the exit code."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"{__doc__}\nCommands:")
        for name in MODULES:
            print(f"  {name:10}{_summary(name)}")
        return ExitCode.OK
    near = difflib.get_close_matches(arguments[0], MODULES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(MODULES)}"
    return report_error(ValueError(f"sltrain has no command {arguments[0]!r}; {hint}"), common=True)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"sltrain.commands.{MODULES[name]}")


def _summary(name: str) -> str:
    """The first sentence of a command's help."""
    return (_module(name).__doc__ or "").partition("`: ")[2].partition("\n")[0]
