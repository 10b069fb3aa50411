"""A study: candidates, each at its own best setting, compared under one protocol. conf/study/NAME.yaml -> its runs.

    trials     every candidate is tuned by the same number of them: the grid of its `tune`, each point trained with the
               tuning seeds and judged on half a of the validation documents (eval_part=a)
    screening  where it is set, one step of successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all trials
               are made with these overrides first, which shorten them; of each candidate the best `finalists` in whole
    reports    the setting with the lowest mean loss is trained with the reporting seeds, which are others, and judged
               on half b. A seed is that of weights, supports and data: runs of one seed read the same rows in order

Everything is composed and checked before the first run starts: what no candidate may change (text, tokenizer, rows),
that all are tried equally often, and what one has as much of as another (`equal`). A run that others start from
(`init_from`, `support_from`) is looked for when they start. The runs are made by
commands/compare.py, kept in ledger.py, and read by reporting/study.py. No torch at the top.
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from operator import sub
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sltrain.api.overrides import as_overrides
from sltrain.api.plan_config import split_arguments
from sltrain.compose import Schema, compose_config, conf_dir, parse_overrides, run_config
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig, num_steps
from sltrain.engine.metrics import to_strict_json
from sltrain.log import first_line
from sltrain.reporting.study import TOLERANCE, setting_text

# Role of a run -> the half of the validation documents it is judged on.
PARTS = {"screening": "a", "tuning": "a", "reporting": "b"}
OWN = ("seed", "eval_part", "run_dir", "resume", "extend")  # keys that the study sets
SAME = (  # keys that decide which tokens are read and predicted
    "data path repo config split validation_path tokenizer tokenizer_eos padding attention seq_len on_bad_data"
    " eval_tokens"
).split()
QUANTITIES = ("tokens", "parameters", "flops")
FREE = {*CHANGEABLE_ON_RESUME} - {*SAME, "eval_part"}  # keys of the machine, the folder and the log


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


@dataclass
class Candidate:
    """One entry of `candidates` in a study's YAML."""

    overrides: list[str] = field(default_factory=list)  # as typed for sltrain-train, over the common ones
    tune: dict[str, list[Any]] = field(default_factory=dict)  # key -> values; their grid are the trials
    equal: dict[str, str] = field(default_factory=dict)  # tokens, parameters or flops -> who has as many
    seen: int = 0  # positions that the weights of its init_from were trained on; they count as its tokens

    def settings(self) -> list[dict[str, Any]]:
        """The grid of `tune`."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]


@dataclass
class StudyFile:
    """A study's YAML."""

    common: list[str] = MISSING  # overrides of all runs
    reference: str = MISSING  # the candidate that the others are compared with
    trials: int = MISSING  # settings tried of each candidate
    screening: list[str] = field(default_factory=list)  # overrides of a shorter look at every trial; none: no such look
    finalists: int | None = None  # trials of each candidate that are made in whole after it; None: all
    tuning_seeds: list[int] = MISSING
    reporting_seeds: list[int] = MISSING
    candidates: dict[str, Candidate] = MISSING

    @property
    def num_finalists(self) -> int:
        return self.finalists or self.trials


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    role: str  # one of PARTS
    candidate: str
    trial: int  # the number of its setting in the candidate's grid, from 1
    setting: dict[str, Any]
    seed: int
    overrides: list[str]  # for sltrain-train, without run_dir
    config: dict[str, Any]  # what decides its numbers, typed or by default, see `recorded`

    @property
    def name(self) -> str:
        """Of its folder. Tuning and reporting seeds are different numbers."""
        name = f"{self.candidate}_trial-{self.trial}_seed-{self.seed}"
        return f"{name}_screening" if self.role == "screening" else name

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What it is in the study."""
        return self.role, self.candidate, self.trial, self.seed


@dataclass(frozen=True)
class Study:
    """A checked study with the configuration of every trial."""

    name: str
    file: StudyFile
    configs: dict[tuple[str, int], TrainConfig]  # (candidate, trial) -> its configuration, seed and half left out
    screened: dict[tuple[str, int], TrainConfig]  # the same with the overrides of the screening; empty without one

    def protocol(self) -> dict[str, Any]:
        """What must stay while a ledger grows; candidates may join."""
        own = asdict(self.file).items()
        return {key: value for key, value in own if key != "candidates" and value not in ([], None)}

    def screening_runs(self) -> Iterator[StudyRun]:
        """All trials, shortened; none without a screening."""
        return self._tuning("screening", dict.fromkeys(self.file.candidates, self._trials if self.screened else ()))

    def tuning_runs(self, finalists: Mapping[str, Sequence[int]]) -> Iterator[StudyRun]:
        """The trials of each candidate that are made in whole."""
        return self._tuning("tuning", finalists)

    def _tuning(self, role: str, trials: Mapping[str, Sequence[int]]) -> Iterator[StudyRun]:
        """Trial by trial, candidates in turn: what changes on the machine meanwhile meets all of them."""
        for place in range(max(map(len, trials.values()))):
            for seed in self.file.tuning_seeds:
                for name in self.file.candidates:
                    yield self._run(role, name, trials[name][place], seed)

    def reporting_runs(self, chosen: Mapping[str, int]) -> Iterator[StudyRun]:
        """Seed by seed, candidates in turn, each with its chosen trial."""
        for seed in self.file.reporting_seeds:
            for name in self.file.candidates:
                yield self._run("reporting", name, chosen[name], seed)

    def config(self, role: str, name: str, trial: int) -> TrainConfig:
        """Of a run in this role, seed and half left out."""
        return (self.screened if role == "screening" else self.configs)[name, trial]

    def runs_of_each(self) -> dict[str, int]:
        """Runs of one candidate, by role."""
        seeds, trials = len(self.file.tuning_seeds), self.file.trials
        counts = {"screening": seeds * trials} if self.screened else {}
        return {**counts, "tuning": seeds * self.file.num_finalists, "reporting": len(self.file.reporting_seeds)}

    def updates_of(self) -> dict[str, int]:
        """Updates of all runs of each candidate."""
        counts = self.runs_of_each().items()
        names = self.file.candidates
        return {name: sum(count * num_steps(self.config(role, name, 1)) for role, count in counts) for name in names}

    @property
    def num_runs(self) -> int:
        return sum(self.runs_of_each().values()) * len(self.file.candidates)

    @property
    def _trials(self) -> range:
        return range(1, self.file.trials + 1)

    def _run(self, role: str, name: str, trial: int, seed: int) -> StudyRun:
        setting = self.file.candidates[name].settings()[trial - 1]
        config = replace(self.config(role, name, trial), seed=seed, eval_part=PARTS[role])
        typed = _overrides(self.file, name, setting, is_screening=role == "screening")
        texts = [*typed, f"seed={seed}", f"eval_part={PARTS[role]}"]
        return StudyRun(role, name, trial, setting, seed, texts, recorded(config))


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
    if both := {*screening} & {*own, *candidate.tune}:
        raise ValueError(f"the screening sets {min(both)}, and so does candidate {name}; let it only shorten runs")
    for key in [*keys, *candidate.tune]:
        if key in OWN:
            raise ValueError(f"candidate {name} sets {key}, which the study sets; drop it")


def _overrides(file: StudyFile, name: str, setting: Mapping[str, Any], is_screening: bool) -> list[str]:
    last = file.screening if is_screening else []
    return [*file.common, *file.candidates[name].overrides, *as_overrides(setting), *last]


def _compose(file: StudyFile, is_screening: bool = False) -> dict[tuple[str, int], TrainConfig]:
    """The configuration of every trial. Raises ValueError for one that cannot be, or reads other text than the rest."""
    configs = {}
    first = next(iter(file.candidates))
    for name, candidate in file.candidates.items():
        for trial, setting in enumerate(candidate.settings(), start=1):
            try:
                config = run_config(_overrides(file, name, setting, is_screening))
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
    tokens as the reference. Raises ValueError. What only a tokenizer could tell is left to the page."""
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
        if start and quantity == "flops":
            raise ValueError(
                f"candidate {one} starts from init_from={start}, whose FLOPs are not known; say that something else is"
                " equal (equal: {tokens: NAME})"
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
    """How much of a quantity each trial of a candidate has, where it is known."""
    found = {}
    for trial in range(1, study.file.trials + 1):
        config = study.configs[name, trial]
        if quantity == "tokens":
            found[trial] = positions(config) + (study.file.candidates[name].seen if config.init_from else 0)
        elif size := size_of(config):
            found[trial] = size.parameters if quantity == "parameters" else size.flops
    return found


def positions(config: TrainConfig) -> int:
    """Positions that the run trains on, pads included."""
    return num_steps(config) * config.global_batch_size * config.seq_len


@dataclass(frozen=True)
class Size:
    """What a run is made of, counted on its model without memory."""

    parameters: int  # at the end
    flops: int  # of the whole training
    flops_per_token: float  # on average


def size_of(config: TrainConfig) -> Size | None:
    """None where the vocabulary is not known without the tokenizer, or a layer cannot count its arithmetic."""
    vocab_size = config.model.vocab_size or _vocab_size(config.tokenizer)
    if vocab_size is None:
        return None
    import torch

    from sltrain.building.model import build_model
    from sltrain.building.phases import phases_of, structures
    from sltrain.models.llama import LlamaForCausalLM
    from sltrain.planning.accounting import count_parameters
    from sltrain.planning.flops import flops_per_token

    model = build_model(config, vocab_size, torch.float32)
    begins = [0, *(phase.after for phase in phases_of(config) if phase.after > 0), num_steps(config)]
    flops = 0
    for (_, structure), updates in zip(structures(config, model), map(sub, begins[1:], begins), strict=True):
        assert isinstance(structure, LlamaForCausalLM)
        try:
            flops += flops_per_token(structure, config.seq_len) * positions(config) // num_steps(config) * updates
        except ValueError:
            return None
    return Size(count_parameters(structure)["total"], flops, flops / positions(config))


def _vocab_size(tokenizer: str) -> int | None:
    """That of bpe:SIZE, or of a file; None for a name on the Hub."""
    if trained := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return int(trained[1])
    if not Path(tokenizer).is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(tokenizer).get_vocab_size()


def recorded(config: TrainConfig) -> dict[str, Any]:
    """Every key that decides the numbers of a run, as a ledger holds it: defaults too, since a later version may have
    others. Options of a group have dotted keys."""
    found: dict[str, Any] = {}
    for key, value in asdict(config).items():
        is_group = is_dataclass(getattr(config, key))
        found |= {f"{key}.{option}": own for option, own in value.items()} if is_group else {key: value}
    kept = {key: value for key, value in found.items() if not {key, key.partition(".")[0]} & FREE}
    return dict(json.loads(to_strict_json(kept)))
