"""A study: candidates, each at its own best setting, compared under one protocol. conf/study/NAME.yaml -> its runs.

    trials     every candidate is tuned by the same number of them: the grid of its `tune`, each point trained with the
               tuning seeds and judged on half a of the validation documents (eval_part=a)
    screening  where it is set, one step of successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all trials
               are made with these overrides first, which shorten them; of each candidate the best `finalists` in whole
    reports    the setting with the lowest mean loss is trained with the reporting seeds, which are others, and judged
               on half b. A seed is that of weights, supports and data: runs of one seed read the same rows in order

study_file.py reads and checks it; its runs are made by commands/compare.py, kept in ledger.py, and read by
reporting/study.py. No torch at the top.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import MISSING

from sltrain.api.overrides import as_overrides
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig, num_steps
from sltrain.engine.metrics import to_strict_json

# Role of a run -> the half of the validation documents it is judged on.
PARTS = {"screening": "a", "tuning": "a", "reporting": "b"}
SAME = (  # keys that decide which tokens are read and predicted
    "data path repo config split validation_path tokenizer tokenizer_eos padding attention seq_len on_bad_data"
    " eval_tokens"
).split()
FREE = {*CHANGEABLE_ON_RESUME} - {*SAME, "eval_part"}  # keys of the machine, the folder and the log


@dataclass
class Candidate:
    """One entry of `candidates` in a study's YAML."""

    overrides: list[str] = field(default_factory=list)  # as typed for sltrain-train, over the common ones
    tune: dict[str, list[Any]] = field(default_factory=dict)  # key -> values; their grid are the trials
    equal: dict[str, str] = field(default_factory=dict)  # tokens, parameters, flops or time -> who has as much
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

    def size_of(self, name: str) -> "Size | None":
        """Of a candidate, on average over its trials."""
        sizes = [size for trial in self._trials if (size := size_of(self.configs[name, trial]))]
        if len(sizes) < self.file.trials:
            return None
        means = [fmean(getattr(size, each) for size in sizes) for each in ("parameters", "flops", "flops_per_token")]
        return Size(round(means[0]), round(means[1]), means[2])

    @property
    def num_runs(self) -> int:
        return sum(self.runs_of_each().values()) * len(self.file.candidates)

    @property
    def _trials(self) -> range:
        return range(1, self.file.trials + 1)

    def _run(self, role: str, name: str, trial: int, seed: int) -> StudyRun:
        setting = self.file.candidates[name].settings()[trial - 1]
        config = replace(self.config(role, name, trial), seed=seed, eval_part=PARTS[role])
        typed = overrides_of(self.file, name, setting, is_screening=role == "screening")
        texts = [*typed, f"seed={seed}", f"eval_part={PARTS[role]}"]
        return StudyRun(role, name, trial, setting, seed, texts, recorded(config))


def overrides_of(file: StudyFile, name: str, setting: Mapping[str, Any], is_screening: bool) -> list[str]:
    """What is typed for sltrain-train for a setting of a candidate, seed and half left out."""
    last = file.screening if is_screening else []
    return [*file.common, *file.candidates[name].overrides, *as_overrides(setting), *last]


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
