"""`sltrain-eval`: the perplexity of a trained model on any text, or its numbers in downstream tasks.

    sltrain-eval outputs/my_run                                        on the run's own validation text
    sltrain-eval outputs/my_run --path '/data/*.json.gz' --json        on other files, as one JSON object
    sltrain-eval my_model --path notes.txt --eval-tokens 100000        an exported model, the first 100,000 tokens
    sltrain-eval my_model --path book.txt --padding pack               whole documents, row after row
    sltrain-eval outputs/my_run --tasks piqa,hellaswag --limit 200     tasks of lm-eval, 200 documents of each

Text is cut into rows as it was in training: with padding=truncate_pad, of a longer document only the first row is read.
perplexity is exp(sum of token losses / tokens); bits_per_byte does not depend on the tokenizer.
perplexity_galore_protocol is the number of the harness behind published tables, which divides by one batch too many;
where few batches make it lower than 0.9 of the perplexity, it is left out.

Tasks are those of the LM Evaluation Harness (pip install lm-eval), by name or as a YAML file of your own; with --tasks
no perplexity is measured.
"""

import argparse

from sltrain.commands.flags import make_parser
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command)


def arguments_parser() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = make_parser("sltrain-eval", __doc__ or "")
    parser.add_argument("model", metavar="RUN", help="a run folder, or one that sltrain-export wrote")
    parser.add_argument(
        "--path", nargs="+", metavar="GLOB", help="files of text (JSON lines, parquet, plain); the run's own by default"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint; the newest intact by default")
    parser.add_argument(
        "--eval-tokens", type=int, metavar="N", help="predict at most about N tokens; default: all of GLOB"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences at a time; the run's by default")
    parser.add_argument("--tasks", metavar="A,B", help="downstream tasks or groups of lm-eval, or YAML files")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task; all by default")
    parser.add_argument(
        "--padding",
        choices=("truncate_pad", "pack", "best_fit"),
        help="pack: whole documents, in rows without gaps; best_fit: whole documents, as many as fit into a row;"
        " truncate_pad: the first row of each; as trained by default",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@lines_on("stderr")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-eval` with these arguments and return its exit code."""
    try:
        typed = arguments_parser().parse_args(arguments)
        tasks = chosen_tasks(typed)
        from sltrain.api.evaluate import evaluate_saved, evaluate_saved_tasks
        from sltrain.engine.metrics import to_strict_json

        options = {"step": typed.step, "batch_size": typed.batch_size, "device": typed.device}
        if tasks:
            numbers = evaluate_saved_tasks(typed.model, tasks, limit=typed.limit, **options)
        else:
            text = {"eval_tokens": typed.eval_tokens, "padding": typed.padding}
            numbers = evaluate_saved(typed.model, typed.path, **text, **options)
        print(to_strict_json(numbers) if typed.json else as_text(numbers), flush=True)
    except Exception as error:
        return report_error(error)
    return ExitCode.OK


def chosen_tasks(typed: argparse.Namespace) -> list[str]:
    """The names in --tasks. Raises ValueError for flags that do not go together."""
    if typed.tasks is None:
        if typed.limit is not None:
            raise ValueError(f"--limit {typed.limit} is for --tasks; of text, --eval-tokens limits what is read")
        return []
    tasks = [name.strip() for name in typed.tasks.split(",") if name.strip()]
    if not tasks:
        raise ValueError("--tasks names no task; --tasks piqa,hellaswag names two")
    for flag in ("path", "eval_tokens", "padding"):
        if getattr(typed, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} is for text, and --tasks reads none; drop one of the two")
    return tasks


def as_text(numbers: dict) -> str:
    """The numbers for a person."""
    lines = []
    for name, value in numbers.items():
        if name == "tasks":
            rows = [(f"{task} {metric}", number) for task, own in value.items() for metric, number in own.items()]
            width = max(28, *(len(row) + 2 for row, _ in rows))
            lines += [f"{row:{width}}{number:,.4f}" for row, number in rows]
        else:
            lines.append(f"{name:28}{value:,}" if isinstance(value, int) else f"{name:28}{value:,.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
