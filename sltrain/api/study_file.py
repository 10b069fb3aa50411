"""A study's YAML and what was typed over it -> a checked study, all of it composed before the first run starts:

    every candidate is tried equally often, and sets nothing that the study sets
    no candidate changes the text, the tokenizer or the rows
    what one has as much of as another (`equal`) it has with every setting

A run that others start from (`init_from`, `support_from`) is looked for when they start. No torch at the top.
"""

import difflib
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.api.plan_config import split_arguments
from sltrain.api.study import SAME, Candidate, Study, StudyFile, overrides_of, positions, size_of
from sltrain.compose import Schema, compose_config, conf_dir, parse_overrides, run_config
from sltrain.config import TrainConfig, num_steps
from sltrain.log import first_line
from sltrain.reporting.study import TOLERANCE, setting_text

OWN = ("seed", "eval_part", "run_dir", "resume", "extend")  # keys that the study sets
QUANTITIES = ("tokens", "parameters", "flops", "time")
LENGTH = {"max_steps", "max_tokens", "warmup_steps", "decay_steps"}  # keys that a screening may shorten for all


@dataclass
class CompareConfig:
    """Keys of `sltrain-compare`."""

    study: str = MISSING  # a name in conf/study, or a YAML file
    run_dir: str | None = None  # where its runs, ledger and page are; None: outputs/studies/NAME
    jobs: int = 1  # runs at once, each on a GPU where there are some, and with a share of the CPU's threads
    dry_run: bool = False  # print the cost, run nothing


def check_jobs(config: CompareConfig) -> None:
    if config.jobs < 1:
        raise ValueError(f"jobs={config.jobs}: must be at least 1")


COMPARE = Schema(
    "compare",
    CompareConfig,
    check_jobs,
    has_groups=False,
    order="all keys of sltrain-train can be set too (sltrain-train --help)",
    advice="choose a study: study=first",
)


def read_arguments(arguments: list[str]) -> tuple[CompareConfig, Study]:
    """What was typed for `sltrain-compare`, checked. Raises ValueError."""
    own, others = split_arguments(arguments, asdict(CompareConfig()), "sltrain-compare")
    settings = compose_config(own, COMPARE)
    return settings, read_study(settings.study, others)


def folder_of_study(settings: CompareConfig, study: Study) -> Path:
    """Where the study's runs, ledger and page are."""
    return Path(settings.run_dir or f"outputs/studies/{study.name}").expanduser()


def read_study(name: str, typed: list[str]) -> Study:
    """The study of this name or file, with the overrides `typed` after its common ones. Raises ValueError."""
    path = path_of_study(name)
    try:
        content = OmegaConf.merge(OmegaConf.structured(StudyFile), OmegaConf.load(path))
        missing = sorted(OmegaConf.missing_keys(content))
        if missing:
            raise ValueError(f"{path}: {missing[0]} is not set")
        plain: Any = OmegaConf.to_container(content, resolve=False)  # ${...} is the business of the runs
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: {problem or first_line(error)}") from error
    except OmegaConfBaseException as error:
        reason = "must be a list: [max_steps=500, lr=1e-3]" if "not a ListConfig" in str(error) else first_line(error)
        raise ValueError(f"{path}: {error.full_key}: {reason}") from error
    except OSError as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    candidates = {key: Candidate(**own) for key, own in plain["candidates"].items()}
    file = StudyFile(**{**plain, "common": [*plain["common"], *typed], "candidates": candidates})
    try:
        _check(file)
        screened = _compose(file, is_screening=True) if file.screening else {}
        study = Study(path.stem, file, _compose(file), screened)
        _check_shorter(study)
        _check_equal(study)
    except ValueError as error:
        raise ValueError(f"study={name}: {error}") from error
    return study


def path_of_study(name: str) -> Path:
    """The YAML file that study=NAME means. Raises ValueError if there is none."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise ValueError(f"study={name}: there is no such file")
    names = sorted(path.stem for path in (conf_dir() / "study").glob("*.yaml"))
    if name in names:
        return conf_dir() / "study" / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean study={near[0]}? " if near else ""
    raise ValueError(f"study={name} does not exist; {hint}there are: {', '.join(names)}; or name a YAML file")


def _check(file: StudyFile) -> None:
    """What the values alone decide. Raises ValueError."""
    names, tuning, reporting = list(file.candidates), file.tuning_seeds, file.reporting_seeds
    if file.reference not in names:
        raise ValueError(f"reference={file.reference} is none of the candidates {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(f"{names[0]} is the only candidate; a comparison needs another one")
    if file.trials < 1:
        raise ValueError(f"trials={file.trials}: must be at least 1")
    if len(reporting) < 2:
        raise ValueError(f"reporting_seeds={reporting}: an interval needs two or more; 5 are usual")
    if not tuning:
        raise ValueError("tuning_seeds=[]: give at least one")
    if len({*tuning, *reporting}) < len(tuning) + len(reporting):
        raise ValueError(f"tuning_seeds={tuning} and reporting_seeds={reporting}: each seed may be there once only")
    if bool(file.screening) != (file.finalists is not None):
        raise ValueError("screening and finalists belong together; set both or neither")
    if file.finalists is not None and not 0 < file.finalists < file.trials:
        raise ValueError(f"finalists={file.finalists}: must be from 1 to {file.trials - 1}, below trials={file.trials}")
    for name, candidate in file.candidates.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*", name):
            raise ValueError(f"candidate {name!r}: a name is made of letters, digits and . + - _")
        _check_candidate(file, name, candidate)


def _check_candidate(file: StudyFile, name: str, candidate: Candidate) -> None:
    for key, values in candidate.tune.items():
        if len({json.dumps(value) for value in values}) < len(values):
            raise ValueError(f"candidate {name}: tune has a value of {key} twice: {values}")
    if (count := len(candidate.settings())) != file.trials:
        grid = " x ".join(str(len(values)) for values in candidate.tune.values()) or "none"
        raise ValueError(
            f"candidate {name} has {count} settings to try ({grid}), and trials={file.trials} is for all; list more or"
            " fewer values in its tune"
        )
    for quantity, other in candidate.equal.items():
        if quantity not in QUANTITIES:
            raise ValueError(f"candidate {name}: equal={quantity}: choose of {', '.join(QUANTITIES)}")
        if other not in file.candidates:
            raise ValueError(f"candidate {name}: equal says {quantity} of {other}, which is no candidate")
    common, own, screening = (
        [override.key_or_group for override in parse_overrides(texts)]
        for texts in (file.common, candidate.overrides, file.screening)
    )
    keys = [*common, *own, *screening]
    if candidate.seen < 0 or (candidate.seen and "init_from" not in [*keys, *candidate.tune]):
        raise ValueError(f"candidate {name}: seen={candidate.seen} counts what init_from was trained on; set init_from")
    if both := ({*screening} & {*own, *candidate.tune}) - LENGTH:
        raise ValueError(f"the screening sets {min(both)}, and so does candidate {name}; let it only shorten runs")
    for key in [*keys, *candidate.tune]:
        if key in OWN:
            raise ValueError(f"candidate {name} sets {key}, which the study sets; drop it")


def _compose(file: StudyFile, is_screening: bool = False) -> dict[tuple[str, int], TrainConfig]:
    """The configuration of every trial. Raises ValueError for one that cannot be, or reads other text than the rest."""
    configs = {}
    first = next(iter(file.candidates))
    for name, candidate in file.candidates.items():
        for trial, setting in enumerate(candidate.settings(), start=1):
            try:
                config = run_config(overrides_of(file, name, setting, is_screening))
            except ValueError as error:
                what = "screening of " * is_screening + f"candidate {name}, trial {trial}"
                raise ValueError(f"{what}: {error}") from error
            configs[name, trial] = config
            for key in SAME:
                own, other = getattr(config, key), getattr(configs[first, 1], key)
                if own != other:
                    what = f"{key}={own}, and {first} {key}={other}" if isinstance(own, int | str) else f"another {key}"
                    raise ValueError(f"candidate {name} has {what}: perplexities would not compare; set it in common")
    return configs


def _check_equal(study: Study) -> None:
    """Whether candidates have, with every setting, as much of something as they say; those that say nothing, as many
    tokens as the reference. Raises ValueError. What only a tokenizer or the runs could tell is left to the page."""
    for name, candidate in study.file.candidates.items():
        for quantity, other in (candidate.equal or {"tokens": study.file.reference}).items():
            _check_starts(study, name, quantity, other)
            own, others = (_amounts(study, one, quantity) for one in (name, other))
            for (trial, number), (of_other, theirs) in itertools.product(own.items(), others.items()):
                if abs(number / theirs - 1) > (0 if quantity == "tokens" else TOLERANCE):
                    setting = setting_text(candidate.settings()[trial - 1])
                    raise ValueError(
                        f"candidate {name}, trial {trial} ({setting}), has {number / theirs:.3f} times the {quantity}"
                        f" of {other}, trial {of_other} ({number:,} and {theirs:,}); change its shape or max_steps"
                        f" (parameters and FLOPs may differ by {TOLERANCE:.0%}), or say what is equal instead (equal:"
                        " {flops: NAME})"
                    )


def _check_starts(study: Study, name: str, quantity: str, other: str) -> None:
    """Refuse (ValueError) first weights that were trained before, unless the candidate says for how long."""
    trials = range(1, study.file.trials + 1)
    starts = {one: {study.configs[one, trial].init_from for trial in trials} for one in (name, other)}
    if quantity == "parameters" or len(starts[name] | starts[other]) == 1:
        return
    for one, own in starts.items():
        start = next((start for start in own if start), None)
        if start and quantity in ("flops", "time"):
            raise ValueError(
                f"candidate {one} starts from init_from={start}, whose FLOPs and time are not known; say that something"
                " else is equal (equal: {tokens: NAME})"
            )
        if start and not study.file.candidates[one].seen:
            raise ValueError(
                f"candidate {one} starts from init_from={start}, which was trained on tokens of its own; say on how"
                " many positions (seen: 4_096_000), and they count as tokens of the candidate"
            )


def _check_shorter(study: Study) -> None:
    for (name, trial), config in study.screened.items():
        if (updates := num_steps(config)) >= (whole := num_steps(study.configs[name, trial])):
            raise ValueError(
                f"the screening gives candidate {name} {updates:,} updates and the whole run has {whole:,}; shorten it"
                " by max_steps"
            )


def _amounts(study: Study, name: str, quantity: str) -> dict[int, int]:
    """How much of a quantity each trial of a candidate has, where it is known; of time nothing is."""
    found = {}
    for trial in range(1, study.file.trials + 1):
        config = study.configs[name, trial]
        if quantity == "tokens":
            found[trial] = positions(config) + (study.file.candidates[name].seen if config.init_from else 0)
        elif quantity != "time" and (size := size_of(config)):
            found[trial] = size.parameters if quantity == "parameters" else size.flops
    return found
