"""`sltrain-bench`: how fast SLTrain is on this machine, beside dense, the published algorithm, and what is possible.

    sltrain-bench what=layer                              one projection, forward and backward, in every way
    sltrain-bench what=step model=llama_60m               one update of a model: time, tokens a second, peak memory
    sltrain-bench what=data path='data/*.json.gz'         text to rows of ids, and whether a GPU would wait for them
    sltrain-bench what=layer calibrate=true               the prices that layer_path=auto reckons with

The table goes to stdout, or with format=json one object as its last line; progress goes to stderr.
"""

import json
from dataclasses import asdict
from typing import Any

from sltrain.api.bench_config import CANDIDATES, BenchConfig, check_scope, validate
from sltrain.compose import TRAIN, Schema, compose_config, help_text, parse_overrides
from sltrain.errors import ExitCode, report_error, run_as_process, say

BENCH = Schema(
    "bench",
    BenchConfig,
    validate,
    has_groups=False,
    order="conf/bench.yaml sets the rest; `layer:` and the like say which benchmark reads a key",
    advice="choose what=layer, what=step or what=data",
)


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command)


def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-bench` with these arguments and return its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{help_text(BENCH)}\n\nCandidates:")
        for what, names in CANDIDATES.items():
            print(f"  what={what:20} {', '.join(names)}")
        return ExitCode.OK
    try:
        config = read_arguments(arguments)
        train = None if config.what == "layer" else compose_config(train_overrides(config), TRAIN)
        from sltrain.api.bench import build_bench  # torch and the rest, seconds after the cheap checks
        from sltrain.api.bench_data import run_data
        from sltrain.api.bench_layer import run_layer
        from sltrain.api.bench_step import run_step

        bench = build_bench(config, train, say)
        result = {"layer": run_layer, "step": run_step, "data": run_data}[config.what](bench)
    except Exception as error:
        return report_error(error)
    if config.format == "json":
        answer: dict[str, Any] = {"what": config.what, "machine": bench.machine, "settings": asdict(config)}
        print(json.dumps({**answer, "rows": result.rows}), flush=True)
    else:
        print(f"{bench.machine_line}\n\n{result.text}", flush=True)
    return ExitCode.OK


def read_arguments(arguments: list[str]) -> BenchConfig:
    """The checked configuration. Raises ValueError."""
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"{argument}: sltrain-bench knows KEY=VALUE and --help, no other option, and no sweeps")
    config = compose_config(arguments, BENCH)
    check_scope(config, [override.key_or_group for override in parse_overrides(arguments)])
    return config


def train_overrides(config: BenchConfig) -> list[str]:
    """What one would type to `sltrain-train` for the run whose update or stream is measured."""
    overrides = [f"model={config.model or 'llama_60m'}", f"seq_len={config.seq_len}", "data=stdlib"]
    if config.what == "step":
        overrides += [f"global_batch_size={config.batch}", f"micro_batch_size={config.batch}"]
    values = {"layer_path": config.layer_path, "rank": config.rank, "sparsity": config.sparsity}
    return overrides + [f"{key}={value}" for key, value in values.items() if value is not None]


if __name__ == "__main__":
    main()
