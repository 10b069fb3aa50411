"""`sltrain-generate`: continue a text with a trained model.

    sltrain-generate outputs/my_run --prompt "The history of"                       greedy: the likeliest token, always
    sltrain-generate my_model --prompt "The history of" --temperature 0.8 --top-k 50 --seed 1

The text comes token by token on standard output, prompt included. What is not text goes to standard error.
"""

import argparse
import sys

from sltrain.commands.flags import make_parser
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on
from sltrain.streams import is_lost


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command)


def arguments_parser() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = make_parser("sltrain-generate", __doc__ or "")
    parser.add_argument("model", metavar="RUN", help="a run folder, or one that sltrain-export wrote")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", default=100, help="100 by default")
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="0, greedy, by default; 1: as trained"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that have probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the choice; 0 by default")
    parser.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint; the newest intact by default")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto by default")
    return parser


@lines_on("stderr")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-generate` with these arguments and return its exit code."""
    try:
        typed = arguments_parser().parse_args(arguments)
        if not typed.prompt:
            raise ValueError('--prompt is empty: write the beginning of a text, such as --prompt "The"')
        from sltrain.api.generate import continue_text

        for text in continue_text(
            typed.model,
            typed.prompt,
            step=typed.step,
            device=typed.device,
            max_new_tokens=typed.max_new_tokens,
            temperature=typed.temperature,
            top_k=typed.top_k,
            top_p=typed.top_p,
            seed=typed.seed,
        ):
            print(text, end="", flush=True)
            if is_lost(sys.stdout):  # the reader has seen enough, as `| head` does
                return ExitCode.OK
        print(flush=True)
    except Exception as error:
        return report_error(error)
    return ExitCode.OK


if __name__ == "__main__":
    main()
