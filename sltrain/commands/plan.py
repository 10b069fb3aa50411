"""`sltrain-plan`: where every byte of a training run goes, before it starts, and which cards it fits.

    sltrain-plan model=llama_7b optimizer=adam8bit per_layer_update=true      any run of sltrain-train, in 1e9 bytes
    sltrain-plan model=llama_1b global_batch_size=8 cards=[24,h100]           on these cards
    sltrain-plan model=llama_350m paper_convention=true                       as the SLTrain paper's table 2 counts
    sltrain-plan model=llama_60m global_batch_size=2 micro_batch_size=2 device=cpu measure=true
                                                                              beside what three updates take here

Arguments are those of sltrain-train and a few of its own. No GPU is touched. A plan is for a CUDA card and bfloat16
unless device=cpu or dtype=float32 says otherwise. With format=json the last line of stdout is one object.
"""

import difflib
import json
import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sltrain.api.plan_config import PlanConfig, validate
from sltrain.commands.help_text import help_text
from sltrain.compose import TRAIN, Schema, compose_config, parse_overrides
from sltrain.config import NoBudget, TrainConfig
from sltrain.errors import ExitCode, report_error, run_as_process
from sltrain.log import lines_on

if TYPE_CHECKING:
    from sltrain.api.plan import Column, Plan

logger = logging.getLogger(__name__)

PLAN = Schema(
    "plan",
    PlanConfig,
    validate,
    has_groups=False,
    order="conf/plan.yaml sets the rest; all keys of sltrain-train can be set too (sltrain-train --help)",
    advice="sltrain-plan --help lists the keys",
)
ANY_BUDGET = 10_000  # updates; a plan asks for the phases of a run, if its method has any
KEYS = {item.name for item in fields(PlanConfig)}


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
        own, others = split_arguments(arguments)
        settings, config = compose_config(own, PLAN), compose_run(others)
        from sltrain.api.plan import build_plan  # torch and the rest, seconds after the cheap checks

        plan = build_plan(settings, config)
    except Exception as error:
        return report_error(error)
    if settings.format == "json":
        for note in plan.notes:
            logger.info(f"note: {note}")
        print(json.dumps(as_object(plan)), flush=True)
    else:
        print(as_table(plan, settings.reserve_gb), flush=True)
    return ExitCode.OK


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The overrides of this command's own keys, and those of `sltrain-train`. Raises ValueError."""
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"{argument}: sltrain-plan knows KEY=VALUE and --help, no other option, and no sweeps")
    keys = [override.key_or_group for override in parse_overrides(arguments)]
    for key in keys:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if near and key not in KEYS:
            raise ValueError(f"unknown key {key!r}; did you mean {near[0]}?")
    own = [text for text, key in zip(arguments, keys, strict=True) if key in KEYS]
    others = [text for text, key in zip(arguments, keys, strict=True) if key not in KEYS]
    return own, others


def compose_run(overrides: list[str]) -> TrainConfig:
    """The configuration of a run that is only planned: it needs no budget. Raises ValueError."""
    try:
        return compose_config(overrides, TRAIN)
    except NoBudget:
        return compose_config([*overrides, f"max_steps={ANY_BUDGET}"], TRAIN)


def as_object(plan: "Plan") -> dict[str, Any]:
    """What format=json prints: the run itself, and the others under `compared`."""
    own, *others = plan.columns

    def describe(column: "Column") -> dict[str, Any]:
        return {
            "total_bytes": column.total_bytes,
            "groups": column.groups,
            "num_parameters": column.num_parameters,
            "fits": plan.fits(column),
        }

    return {
        **describe(own),
        **({} if own.paper_millions is None else {"paper_millions": float(own.paper_millions)}),
        **({} if plan.measured_bytes is None else {"measured_bytes": plan.measured_bytes}),
        "compared": {column.name: describe(column) for column in others},
    }


def as_table(plan: "Plan", reserve_gb: float) -> str:
    """Markdown for people; groups in which no column has a byte are left out."""
    columns = plan.columns
    rows = [["GB (1e9 bytes)", *(column.name for column in columns)]]
    for group in columns[0].groups:
        num_bytes = [column.groups.get(group, 0) for column in columns]
        if any(num_bytes):
            rows.append([group.replace("_", " "), *(f"{number / 1e9:.3f}" for number in num_bytes)])
    rows.append(["total", *(f"{column.total_bytes / 1e9:.3f}" for column in columns)])
    if plan.measured_bytes is not None:
        rows.append(["measured here", f"{plan.measured_bytes / 1e9:.3f}", *[""] * (len(columns) - 1)])
    rows.append(["parameters", *(f"{c.paper_millions or round(c.num_parameters / 1e6, 1)}M" for c in columns)])
    for card in plan.cards:
        rows.append([f"fits {card}", *("yes" if plan.fits(column)[card] else "no" for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    lines = [_line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]))
    foot = [f"cards: their GiB less {reserve_gb:g} GB for the driver, its libraries and fragments"]
    return "\n".join([plan.headline, "", *lines, "", *foot, *(f"note: {note}" for note in plan.notes)])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
