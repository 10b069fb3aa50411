"""`sltrain-bench`: how fast SLTrain is on this machine, beside dense, the published algorithm, and what is possible.

    sltrain-bench what=layer                              one projection, forward and backward, in every way
    sltrain-bench what=step model=llama_60m               one update of a model: time, tokens a second, peak memory
    sltrain-bench what=data path='data/*.json.gz'         text to rows of ids, and whether a GPU would wait for them
    sltrain-bench what=layer calibrate=true               the prices that layer_path=auto uses

The table goes to stdout, or with format=json one object as its last line; progress goes to stderr.
"""

import json

from sltrain.benchmarks.settings import (
    LAYER_CANDIDATES,
    STEP_CANDIDATES,
    BenchConfig,
    check_scope,
    validate,
)
from sltrain.commands.help_text import help_text
from sltrain.compose import Schema, compose_config, parse_overrides
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on

BENCH = Schema(
    "bench",
    BenchConfig,
    validate,
    has_groups=False,
    order="conf/bench.yaml sets the rest; `layer:` and the like say which benchmark reads a key",
    advice="choose what=layer, what=step or what=data",
)
CANDIDATES = f"""
Candidates:
  what=layer  {", ".join(LAYER_CANDIDATES)}; any layer kind by its name;
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


def read_arguments(arguments: list[str]) -> BenchConfig:
    """The checked configuration. Raises ValueError."""
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"{argument}: sltrain-bench knows KEY=VALUE and --help, no other option, and no sweeps")
    config: BenchConfig = compose_config(arguments, BENCH)
    check_scope(config, [override.key_or_group for override in parse_overrides(arguments)])
    return config


if __name__ == "__main__":
    main()
