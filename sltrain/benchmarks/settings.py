"""The schema of `sltrain-bench`: every key with type, unit and scope. Values come from conf/bench.yaml and the command
line. This file does not import torch."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from sltrain.compose import Schema, compose_config, parse_overrides
from sltrain.config_checks import CHOICES as RUN_CHOICES
from sltrain.methods.base import METHODS
from sltrain.methods.sltrain import SUPPORTS
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.registry import Registry


@dataclass
class BenchConfig:
    """One benchmark."""

    what: str = MISSING  # layer: one projection; step: one update of a model; data: text to rows of ids
    format: str = MISSING  # table, or json: the last line of stdout is one object
    device: str = MISSING  # layer, step: auto, cpu or cuda
    dtype: str = MISSING  # layer, step: auto, float32 or bfloat16
    time_limit_s: float = MISSING  # layer, step: seconds for the whole command
    repeats: int | None = None  # how often each candidate is timed; None: as often as time allows, at least twice
    candidates: list[str] | None = None  # layer, step: what to compare, see below; None: the usual, if time allows
    methods: Any = None  # step: a list of methods to compare with method=full, or all
    optimizers: Any = None  # step: a list of optimizers to compare with optimizer=adamw on one method, or all
    method: str = MISSING  # step: what the optimizers train

    # what=layer
    tokens: int = MISSING  # layer: rows of x
    shapes: list[list[int]] = MISSING  # layer: a list of [out, in, rank]
    calibrate: bool = MISSING  # layer: only measure the prices that layer_path=auto uses

    # what=step, what=data
    model: str | None = None  # step, data: a model of sltrain-train, with its recipe; None: for data, llama_60m
    seq_len: int = MISSING  # step, data: tokens a row
    batch: int = MISSING  # step: rows of a micro-batch
    path: Any = None  # data: a glob or a list of globs; None: the Python standard library
    prepared: str | None = None  # data: a folder that sltrain-tokenize made with this tokenizer; times reading it too
    tokenizer: str = MISSING  # data: a tokenizer.json, a name on the Hub, or bpe:SIZE to train one on the corpus
    layer_path: str = MISSING  # step: auto, composed or factored
    rank: int | None = None  # step: None: the model's recipe

    sparsity: float | None = None  # layer, step: fraction of S that is trained; None: 0.03, or the model's recipe
    block_size: int | None = None  # layer, step: side of a block; None: the largest that reaches the sparsity


# Named candidates. Both lists are open: what=layer also takes every registered layer kind, and NAME_PATH for one of its
# paths; what=step also takes every registered method.
LAYER_CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> layer kind and settings
    "dense": ("nn.Linear", {}),
    **{support: ("sltrain", {"support": support}) for support in SUPPORTS},  # SLTrainLinear(...) as constructed
    "low_rank": ("low_rank", {}),
    "published": ("published", {}),  # the published algorithm: benchmarks/published.py
}
STEP_CANDIDATES: dict[str, tuple[str, ...]] = {  # name -> overrides of sltrain-train
    "full": ("method=full",),
    **{support: ("method=sltrain", f"support={support}") for support in SUPPORTS},
    "block": ("method=sltrain", "support=block", "block_size={block_size}"),
    "checkpointing": ("method=sltrain", "support=uniform", "activation_checkpointing=true"),
    "transformers": ("method=full",),  # transformers' LLaMA, dense
    "transformers_published": ("method=sltrain", "support=uniform"),  # the same with the published layer
}
USUAL = {  # the default candidates, the most important first
    "layer": "dense uniform stratified block column low_rank uniform_composed published".split(),
    "step": "full uniform block transformers_published transformers checkpointing".split(),
}

BASES = {"methods": "full", "optimizers": "adamw"}  # what all of a list is compared with
BY_NAME: dict[str, Registry[Any]] = {"methods": METHODS, "optimizers": OPTIMIZERS}

CHOICES = {
    "what": ("layer", "step", "data"),
    "format": ("table", "json"),
    **{key: RUN_CHOICES[key] for key in ("device", "dtype", "layer_path")},
}
AT_LEAST = {"tokens": 1, "batch": 1, "seq_len": 2, "repeats": 1, "rank": 1, "block_size": 1}
COMMON = "what format repeats".split()
KEYS = {  # what a benchmark reads besides COMMON
    "layer": "device dtype time_limit_s candidates tokens shapes calibrate sparsity block_size".split(),
    "step": "device dtype time_limit_s candidates model seq_len batch layer_path rank sparsity block_size".split()
    + "methods optimizers method".split(),
    "data": "model seq_len path prepared tokenizer".split(),
}


def validate(config: BenchConfig) -> None:
    """Check what needs neither model nor layer. Raises ValueError naming the key, its value and what to change."""
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise ValueError(f"{key}={getattr(config, key)}: choose one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        number = getattr(config, key)
        if number is not None and not number >= least:
            raise ValueError(f"{key}={number}: must be at least {least}")
    if not 0 < config.time_limit_s < float("inf"):
        raise ValueError(f"time_limit_s={config.time_limit_s}: must be a number of seconds above 0")
    if config.sparsity is not None and not 0 < config.sparsity < 1:
        raise ValueError(f"sparsity={config.sparsity}: must be above 0 and below 1, the fraction of S that is trained")
    if config.candidates is not None and len(set(config.candidates)) != len(config.candidates):
        raise ValueError(f"candidates={config.candidates}: name each candidate once")
    if config.candidates == []:
        raise ValueError("candidates=[]: name some (sltrain-bench --help lists them), or omit the key")
    if config.block_size is not None and not any(name.startswith("block") for name in config.candidates or ["block"]):
        raise ValueError(f"block_size={config.block_size} is for the candidate block, which is not compared; drop one")
    if not config.shapes:
        raise ValueError("shapes=[]: give at least one [out, in, rank], such as shapes=[[512,512,128]]")
    for shape in config.shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shapes: {shape} must be [out, in, rank], three numbers of at least 1: [512,512,128]")
        if shape[2] > min(shape[:2]):
            raise ValueError(f"shapes: the rank of {shape} is above the matrix; it can be at most {min(shape[:2])}")
    globs = config.path if isinstance(config.path, list) else [config.path or "the standard library"]
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"path={config.path}: must be a glob, or a list of them: path=[/a/*.json.gz,/b/*.json.gz]")
    compared(config)
    if config.what == "step" and config.model is None:
        raise ValueError("what=step needs a model: add model=llama_60m (sltrain-train --help lists them)")


def compared(config: BenchConfig) -> dict[str, tuple[str, ...]]:
    """The candidates of `methods` or `optimizers`: name -> overrides of sltrain-train, the base first; none without
    such a list. Raises ValueError."""
    given = [key for key in ("methods", "optimizers", "candidates") if getattr(config, key) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} each say what to compare; keep one")
    if given in ([], ["candidates"]):
        return {}
    key, names = given[0], getattr(config, given[0])
    names = BY_NAME[key].names() if names == "all" else names
    if not isinstance(names, list) or not names:
        raise ValueError(f"{key}={names}: give all, or a list: {key}=[{','.join(BY_NAME[key].names()[:3])}]")
    fixed = (f"method={config.method}",) if key == "optimizers" else ()
    return {name: (*fixed, f"{key[:-1]}={name}") for name in [BASES[key], *names]}


def check_scope(config: BenchConfig, typed: Collection[str]) -> None:
    """Refuse typed keys that `what` does not read. Raises ValueError."""
    for key in typed:
        if key not in COMMON and key not in KEYS[config.what]:
            readers = " and ".join(f"what={what}" for what, keys in KEYS.items() if key in keys)
            raise ValueError(f"{key} is for {readers}, not what={config.what}")
    if "method" in typed and config.optimizers is None:
        raise ValueError(f"method={config.method} is what optimizers=[...] train; to compare methods=[{config.method}]")
    if config.calibrate and "candidates" in typed:
        raise ValueError("calibrate=true compares no candidates; drop one of the two")


BENCH = Schema(
    "bench",
    BenchConfig,
    validate,
    has_groups=False,
    order="`layer:`, `step:` and `data:` name the benchmarks that read a key",
    advice="choose what=layer, what=step or what=data",
)


def read_arguments(arguments: list[str]) -> BenchConfig:
    """The configuration from the arguments of `sltrain-bench`, checked. Raises ValueError."""
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"{argument}: sltrain-bench takes KEY=VALUE and --help, but no other option and no sweep")
    config: BenchConfig = compose_config(arguments, BENCH)
    check_scope(config, [override.key_or_group for override in parse_overrides(arguments)])
    return config
