"""`sltrain-export`: a run's checkpoint as a folder for transformers, vLLM, lm-eval, or as a small one.

    sltrain-export outputs/my_run --output my_model                         dense, AutoModelForCausalLM opens it
    sltrain-export outputs/my_run --output my_model --step 1000             of an earlier checkpoint
    sltrain-export outputs/my_run --output small --format compressed        B, A and S as trained: half of dense at 350M

A dense folder is a LLaMA as everything that reads Hugging Face's format knows it. A compressed one brings its own code
for transformers: AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True) keeps the factors in memory, and
sltrain.load("small") opens it too.

The folder holds safetensors, config.json, generation_config.json, the tokenizer's files and a model card. It gets its
name once the logits computed from its files are those of the trained model.
"""

import argparse
import logging
from pathlib import Path

from sltrain.commands.flags import make_parser
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on

logger = logging.getLogger("sltrain.commands")  # __name__ may be __main__


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command, "interrupted; nothing was exported")


def arguments_parser() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = make_parser("sltrain-export", __doc__ or "")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint; the newest intact one by default")
    parser.add_argument("--format", choices=("dense", "compressed"), default="dense", help="dense by default")
    parser.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0; none by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; the run's own by default")
    return parser


@lines_on("stdout")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-export` with these arguments and return its exit code."""
    try:
        typed = arguments_parser().parse_args(arguments)
        from sltrain.api.export import export, how_to_open
        from sltrain.building.model import DTYPES
        from sltrain.building.saved import open_saved

        output = typed.output.expanduser()
        saved = open_saved(typed.run, typed.step)
        logger.info(f"exporting  {typed.run}, step {saved.step:,}")
        export(saved, output, typed.format, DTYPES.get(typed.dtype), license=typed.license)
    except Exception as error:
        return report_error(error)
    logger.info(f"done       {how_to_open(saved, typed.format, output)}")
    return ExitCode.OK


if __name__ == "__main__":
    main()
