"""Arguments of the commands that look at runs and models instead of configuring one: paths and --flags, by argparse.

    parser = make_parser("sltrain-report", __doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run folder, or a folder with run folders below it")
    typed = parser.parse_args(arguments)  # raises ValueError with one line; --help prints `doc` and the arguments

argparse alone answers a mistake with its usage and ends the process; here a mistake is a ValueError like every other
mistake of a user, for `errors.report_error` to print.
"""

import argparse
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help shows what can be typed")


def make_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """A parser for the command `prog` whose mistakes are ValueErrors of one line.

    `doc` is what `--help` shows above the arguments, as it is: the docstring of the command, with an example. Flags
    are not abbreviated.
    """
    return _Parser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
