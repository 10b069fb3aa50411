"""`sltrain-tokenize`: prepare the ids of a corpus once, so that training reads them instead of text.

    sltrain-tokenize output=/data/wiki data=local path='/text/*.json.gz' tokenizer=t5-base       a folder of ids
    sltrain-train model=llama_60m data=tokens path=/data/wiki                                    trains on it

Takes the keys of sltrain-train that concern text. Several processes work at once; a call that was stopped, or killed,
is continued by typing it again. The rows of a run are those that the text itself would have given. Text that the run
would hold out, or evaluate on, goes into the folder too: data.holdout_every and validation_path count here, not later.
A finished folder is compared with the SHA-256 of every file.
"""

from sltrain.api.tokenize_config import TOKENIZE, read_arguments
from sltrain.commands.help_text import help_text
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command, "interrupted; the same command continues")


@lines_on("stdout")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-tokenize` with these arguments and return its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{help_text(TOKENIZE)}")
        return ExitCode.OK
    try:
        settings, config = read_arguments(arguments)
        from sltrain.api.tokenize import tokenize  # torch and the rest, seconds after the cheap checks

        tokenize(settings, config)
    except Exception as error:
        return report_error(error)
    return ExitCode.OK


if __name__ == "__main__":
    main()
