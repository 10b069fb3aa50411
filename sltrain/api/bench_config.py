"""The schema of `sltrain-bench`: every key a person can set, its type, unit and scope, and what may be compared.

Values come from conf/bench.yaml and the command line. Like config.py it imports nothing of ours and no torch.
"""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class BenchConfig:
    """One benchmark."""

    what: str = MISSING  # layer: one projection; step: one update of a model; data: text to rows of ids
    format: str = MISSING  # table, or json: the last line of stdout is one object
    device: str = MISSING  # layer, step: auto, cpu or cuda
    dtype: str = MISSING  # layer, step: auto, float32 or bfloat16
    time_limit_s: float = MISSING  # layer, step: seconds the whole command should take
    repeats: int | None = None  # times that each candidate is timed; None: as often as time allows, at least twice
    candidates: list[str] | None = None  # layer, step: what is compared, see below; None: the usual, if time allows

    # what=layer
    tokens: int = MISSING  # layer: rows of x
    shapes: list[list[int]] = MISSING  # layer: a list of [out, in, rank]
    calibrate: bool = MISSING  # layer: measure the prices that layer_path=auto reckons with, and nothing else

    # what=step, what=data
    model: str | None = None  # step, data: a model of sltrain-train, with its recipe; None: for data, llama_60m
    seq_len: int = MISSING  # step, data: tokens a row
    batch: int = MISSING  # step: rows of a micro-batch
    path: Any = None  # data: a glob or a list of globs; None: the Python standard library
    tokenizer: str = MISSING  # data: a tokenizer.json, a name on the Hub, or bpe:SIZE to train one on the corpus
    layer_path: str = MISSING  # step: auto, composed or factored
    rank: int | None = None  # step: None: the model's recipe

    sparsity: float | None = None  # layer, step: fraction of S that is trained; None: 0.03, or the model's recipe
    block_size: int | None = None  # layer, step: side of a block; None: the largest that gives the sparsity


CANDIDATES = {
    "layer": (
        "dense",  # nn.Linear
        "uniform",  # SLTrainLinear by its support, on the path that layer_path=auto takes
        "stratified",
        "block",
        "column",
        "uniform_composed",
        "uniform_factored",
        "low_rank",  # B A without S
        "published",  # the published algorithm, written plainly
    ),
    "step": (
        "full",  # method=full
        "uniform",  # method=sltrain by its support
        "stratified",
        "block",
        "column",
        "checkpointing",  # uniform, with activation_checkpointing
        "low_rank",  # method=low_rank
        "transformers",  # transformers' LLaMA, dense
        "transformers_published",  # the same with the published layer in every projection
    ),
}
CHOICES = {
    "what": ("layer", "step", "data"),
    "format": ("table", "json"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "layer_path": ("auto", "composed", "factored"),
}
AT_LEAST = {"tokens": 1, "batch": 1, "seq_len": 2, "repeats": 1, "rank": 1, "block_size": 1}
# Keys that only some benchmarks read; the others are for all.
SCOPE = {
    "tokens": ("layer",),
    "shapes": ("layer",),
    "calibrate": ("layer",),
    "model": ("step", "data"),
    "seq_len": ("step", "data"),
    "batch": ("step",),
    "path": ("data",),
    "tokenizer": ("data",),
    "layer_path": ("step",),
    "rank": ("step",),
    "sparsity": ("layer", "step"),
    "block_size": ("layer", "step"),
    "candidates": ("layer", "step"),
    "time_limit_s": ("layer", "step"),
    "device": ("layer", "step"),
    "dtype": ("layer", "step"),
}


def validate(config: BenchConfig) -> None:
    """Check everything that the numbers alone decide. Raises ValueError naming the key, its value and what to
    change."""
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
        raise ValueError(
            f"sparsity={config.sparsity}: must be above 0 and below 1; it is the fraction of S that is trained"
        )
    _validate_candidates(config)
    if not config.shapes:
        raise ValueError("shapes=[]: give at least one [out, in, rank], such as shapes=[[512,512,128]]")
    for shape in config.shapes:
        _validate_shape(shape)
    globs = config.path if isinstance(config.path, list) else [config.path or ""]
    if not all(isinstance(glob, str) for glob in globs):
        raise ValueError(
            f"path={config.path}: must be a glob, or a list of them as in path=[/a/*.json.gz,/b/*.json.gz]"
        )
    if config.what == "step" and config.model is None:
        raise ValueError("what=step needs a model: add model=llama_60m (sltrain-train --help lists them)")


def _validate_candidates(config: BenchConfig) -> None:
    if config.candidates is None or config.what not in CANDIDATES:
        return
    known = CANDIDATES[config.what]
    if not config.candidates:
        raise ValueError(f"candidates=[]: choose some of {', '.join(known)}, or leave it out for all")
    for name in config.candidates:
        if name not in known:
            raise ValueError(f"candidates: {name} is nothing that what={config.what} compares: {', '.join(known)}")


def _validate_shape(shape: list[int]) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shapes: {shape} must be [out, in, rank], three numbers of at least 1, such as [512,512,128]")
    if shape[2] > min(shape[:2]):
        raise ValueError(f"shapes: the rank of {shape} is above the matrix; it can be at most {min(shape[:2])}")


def check_scope(config: BenchConfig, typed: Any) -> None:
    """Refuse keys that were typed and that `what` does not read. Raises ValueError."""
    for key in typed:
        scope = SCOPE.get(key, CHOICES["what"])
        if config.what not in scope:
            raise ValueError(f"{key} is for {' and '.join(f'what={name}' for name in scope)}, not what={config.what}")
    if config.calibrate and "candidates" in typed:
        raise ValueError("calibrate=true compares no candidates; drop one of the two")
