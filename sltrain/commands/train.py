"""`sltrain-train`: pretrain one model, or with -m a sweep of them.

    sltrain-train model=llama_350m sparsity=0.03                  one run
    sltrain-train run_dir=outputs/my_run                          continues what was started with that run_dir
    sltrain-train init_from=outputs/my_run max_steps=1000         a new run that begins with the weights of another
    sltrain-train -m model=llama_60m rank=64,128                  a sweep, one run after the other
    torchrun --nproc_per_node=8 -m sltrain.train model=llama_1b   one run on eight GPUs
    sltrain-train model=llama_60m rank=64 --cfg job               what that means, as a configuration; nothing is run
    eval "$(sltrain-train -sc install=bash)"                      completion by Tab

Arguments are Hydra overrides of conf/train.yaml or, without a model, of an earlier run's config.yaml. They are composed
and checked before Hydra's own program sees them, so that a mistake costs one line and a second. Only sweeps and Hydra's
own keys and flags need that program; it would compose a single run twice more.
"""

import logging
import sys
from argparse import ArgumentError, Namespace
from dataclasses import asdict

import hydra
from hydra._internal.utils import get_args_parser  # Hydra's own flags, --cfg and the like
from omegaconf import DictConfig, OmegaConf

from sltrain.commands.completion import complete
from sltrain.commands.help_text import help_text
from sltrain.commands.sweep import Sweep, with_options_in_jobs, with_swept_before
from sltrain.compose import (
    TRAIN,
    check_overrides,
    compose_config,
    conf_dir,
    earlier_run_config,
    implied,
    parse_overrides,
    refuse_flags,
    register_schema,
    to_train_config,
)
from sltrain.config import TrainConfig
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on

logger = logging.getLogger("sltrain.commands")  # __name__ may be __main__


def main() -> None:
    """The command. Ends the process with one of the codes in errors.py."""
    run_as_process(run_command, "interrupted before training began; nothing was saved", ExitCode.NOTHING_SAVED)


@lines_on("stdout")
def run_command(arguments: list[str]) -> ExitCode:
    """Run `sltrain-train` with these arguments and return its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{help_text()}")
        return ExitCode.OK
    try:
        typed, arguments = read_flags(arguments)
        about_hydra = typed.shell_completion or typed.info == "plugins"
        earlier = None if about_hydra or typed.multirun else earlier_run_config(typed.overrides)
        if earlier is not None:
            return show(earlier, typed) if typed.cfg or typed.info else train(earlier)
        if typed.multirun:
            arguments, typed.overrides = with_swept_before(arguments, typed.overrides)
            arguments, typed.overrides = (
                with_options_in_jobs(texts, typed.overrides) for texts in (arguments, typed.overrides)
            )
        if is_plain(typed):
            return train(compose_config(typed.overrides, TRAIN))
        register_schema()
        more = implied(typed.overrides)
        arguments, typed.overrides = [*more, *arguments], [*more, *typed.overrides]
        if not about_hydra:
            check_overrides(typed.overrides, typed.multirun)
        sweep = Sweep.plan(typed.overrides) if typed.multirun else None
    except ValueError as error:
        return report_error(error, common=True)

    codes: list[ExitCode] = []

    def task(config: DictConfig) -> None:
        if sweep is None:
            codes.append(train(to_train_config(config)))
        else:
            sweep.run_job()

    sys.argv[1:] = [*(sweep.hydra_overrides if sweep else []), *arguments]
    start_hydra = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(task)
    try:
        if typed.shell_completion:
            complete(typed.overrides, start_hydra)
        else:
            start_hydra()
    except ValueError as error:
        return report_error(error)
    except KeyboardInterrupt:
        if sweep is None:
            raise
        print(f"interrupted; jobs that have begun elsewhere go on; later, run_dir={sweep.folder} continues the others")
        return ExitCode.INTERRUPTED
    except SystemExit:  # an interrupted job ends the sweep; so does a cluster that refuses it, and Hydra has said why
        if sweep is None:
            raise
    if sweep is not None:
        return sweep.finish()
    return codes[0] if codes else ExitCode.OK  # --cfg and the like run no task


def is_plain(typed: Namespace) -> bool:
    """Whether what was typed is one run, and nothing of Hydra's."""
    if any(value for flag, value in vars(typed).items() if flag not in ("overrides", "run")):
        return False
    return not any(override.key_or_group.startswith("hydra") for override in parse_overrides(typed.overrides))


def show(config: TrainConfig, typed: Namespace) -> ExitCode:
    """Print what --cfg asks for, of a configuration over an earlier run's, which Hydra does not compose. Raises
    ValueError for what only Hydra's composition has."""
    if typed.cfg != "job":
        flag = f"--cfg {typed.cfg}" if typed.cfg else f"--info {typed.info}"
        raise ValueError(
            f"{flag} shows how conf/ is composed, add model=NAME; of an earlier run --cfg job shows the keys"
        )
    tree = OmegaConf.create(asdict(config))
    shown = OmegaConf.select(tree, typed.package) if typed.package else tree
    if shown is None:
        raise ValueError(f"--package {typed.package}: the configuration has no such part")
    print(OmegaConf.to_yaml(shown) if OmegaConf.is_config(shown) else shown)
    return ExitCode.OK


def read_flags(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The overrides and Hydra's flags, and the arguments in an order that Hydra can read. Raises ValueError."""
    parser = get_args_parser()
    refuse_flags(arguments, parser._option_string_actions)
    # Hydra wants the overrides together, its own flags may follow.
    arguments = sorted(arguments, key=lambda argument: argument.startswith("-") or "=" not in argument)
    parser.exit_on_error = False
    try:
        typed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(f"{error}; sltrain-train --hydra-help shows the flags") from error
    if typed.config_name or typed.config_path or typed.config_dir:
        raise ValueError(
            "sltrain-train reads its own configuration only; drop --config-name, --config-path, --config-dir"
        )
    return typed, arguments


def train(config: TrainConfig) -> ExitCode:
    """Train one run to its end and say how it ended."""
    try:
        from sltrain.api.train import Outcome, train_run  # torch and the rest, seconds after the cheap checks

        ended = train_run(config)
    except Exception as error:
        return report_error(error)
    if ended.data_error is not None:
        report_error(ended.data_error)
    if ended.outcome is Outcome.OUT_OF_MEMORY:
        return report_error(ValueError(ended.advice))
    logger.info(ended.advice)
    is_bad_data = isinstance(ended.data_error, ValueError)  # and not the network
    return {
        Outcome.FINISHED: ExitCode.OK,
        Outcome.INTERRUPTED: ExitCode.INTERRUPTED if ended.is_saved else ExitCode.NOTHING_SAVED,
        Outcome.DATA_LOST: ExitCode.BAD_INPUT if is_bad_data else ExitCode.DATA_LOST,
        Outcome.DIVERGED: ExitCode.DIVERGED,
    }[ended.outcome]


if __name__ == "__main__":
    main()
