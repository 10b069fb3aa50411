"""`sltrain-bench`: how fast SLTrain is on this machine, beside dense, the published algorithm, and what is possible.

    sltrain-bench what=layer                              one projection, forward and backward, in every way
    sltrain-bench what=step model=llama_60m               one update of a model: time, tokens a second, peak memory
    sltrain-bench what=step model=llama_60m methods=all   every method's update over that of method=full
    sltrain-bench what=step model=llama_60m optimizers=[scale,muon,galore]   and every optimizer's over adamw's
    sltrain-bench what=data path='data/*.json.gz'         text to rows of ids, and whether a GPU would wait for them
    sltrain-bench what=layer calibrate=true               the prices that layer_path=auto uses

The table goes to stdout, or with format=json one object as its last line; progress goes to stderr.
"""

import json

from sltrain.benchmarks.settings import BENCH, LAYER_CANDIDATES, STEP_CANDIDATES, read_arguments
from sltrain.commands.help_text import help_text
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on

CANDIDATES = f"""
Candidates:
  what=layer  {", ".join(LAYER_CANDIDATES)}; any layer kind by its name;
              the supports are SLTrainLinear(...) as constructed, which chooses its path at the first call;
              NAME_PATH to compute one in a certain way, such as uniform_composed (dense W built) or uniform_factored
  what=step   {", ".join(STEP_CANDIDATES)};
              any method by its name"""


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command)


@lines_on("stderr")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-bench` with these arguments and return its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{help_text(BENCH)}\n{CANDIDATES}")
        return ExitCode.OK
    try:
        config = read_arguments(arguments)
        from sltrain.api.bench import measure  # torch and the rest, seconds after the cheap checks

        data, text = measure(config)
    except Exception as error:
        return report_error(error)
    print(json.dumps(data) if config.format == "json" else text, flush=True)
    return ExitCode.OK


if __name__ == "__main__":
    main()
