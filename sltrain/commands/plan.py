"""`sltrain-plan`: where every byte of a training run goes, before it starts, and which cards it fits.

    sltrain-plan model=llama_7b optimizer=adam8bit per_layer_update=true      any run of sltrain-train, in 1e9 bytes
    sltrain-plan model=llama_7b method=full optimizer=adamw,galore,muon,scale a column for each; any key may list values
    sltrain-plan model=llama_1b global_batch_size=8 cards=[24,h100]           on these cards
    sltrain-plan model=llama_7b num_processes=8 bandwidth=50 peak_tflops=989  one of 8; what they send, and how long
    sltrain-plan model=llama_350m paper_convention=true                       as the SLTrain paper's table 2 counts
    sltrain-plan model=llama_60m global_batch_size=2 micro_batch_size=2 device=cpu measure=true
                                                                              beside what three updates take here

Arguments are those of sltrain-train and a few of its own. One run stands beside dense training, GaLore and the
published SLTrain's layout; of several, each combination of listed values is a column, and what could not be trained a
note. No GPU is touched. A plan is for a CUDA card and bfloat16 unless device=cpu or dtype=float32 says otherwise. With
format=json the last line of stdout is one object.
"""

import json
import logging

from sltrain.api.plan_config import PLAN, read_arguments
from sltrain.commands.help_text import help_text
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on

logger = logging.getLogger("sltrain.commands")  # __name__ may be __main__


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command)


@lines_on("stderr")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-plan` with these arguments and return its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{help_text(PLAN)}")
        return ExitCode.OK
    try:
        settings, runs = read_arguments(arguments)
        from sltrain.api.plan import build_plan  # torch and the rest, seconds after the cheap checks

        plan = build_plan(settings, runs)
    except Exception as error:
        return report_error(error)
    if settings.format == "json":
        for note in plan.notes:
            logger.info(f"note: {note}")
        print(json.dumps(plan.as_object()), flush=True)
    else:
        print(plan.table, flush=True)
    return ExitCode.OK


if __name__ == "__main__":
    main()
