"""One update of a whole model: forward, backward and optimizer on full rows of random ids.

Each candidate first runs in a process of its own, which gives its peak memory, a first time, and the time of what
only some updates have (update.py). Then all are timed in turns in this process. If their weights, gradients
and optimizer states do not fit side by side, each model is built for its turn and released after it.

    floor           the multiply-adds of all products (projections, head, causal attention; 3 times forward, and a
                    fourth time what activation checkpointing recomputes) over the rate of the machine's dense product
    limit           floor of full over floor of the candidate: the speed-up if only products took time
    share_of_limit  measured speed-up over limit
    ratio           time over that of the first of `methods` or `optimizers`: of the medians, and its spread over rounds

Times, except `seconds`, count what only some updates have: the seconds of each time times the share of updates.
"""

import gc
import importlib.util
import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, TaskSpec

from sltrain.benchmarks.base import SEED, Bench, Column, Result, Row, format_table, start_bench, vocab_size, write
from sltrain.benchmarks.settings import BASES, STEP_CANDIDATES, USUAL, BenchConfig, compared
from sltrain.benchmarks.timing import MIN_REPEATS, Task, compare, in_turns, product_task
from sltrain.benchmarks.update import (
    PUBLISHED,
    TRANSFORMERS,
    Extra,
    Update,
    build_update,
    longest_phase,
    measure_update,
)
from sltrain.building.model import build_model
from sltrain.building.phases import change_until, check_structures
from sltrain.config import TrainConfig, num_steps
from sltrain.engine.memory import PeakMemory, free_bytes
from sltrain.layers.cost import set_paths
from sltrain.methods.base import METHODS
from sltrain.optim.build import members
from sltrain.planning.accounting import count_parameters
from sltrain.planning.flops import attention_multiply_adds, linear_multiply_adds

logger = logging.getLogger(__name__)

DENSE = BASES["methods"]
NO_SPEC = TaskSpec("", "")
LEAST_CANDIDATES = 3  # measured even after time_limit_s
NUM_PRODUCTS = 8  # timed as one, because an update takes so much longer


@dataclass
class Candidate:
    """One way to train the model, and what is known of it before the rounds."""

    name: str
    train: TrainConfig
    path: str | None  # how W x is computed, where there is a choice
    multiply_adds: int  # of the products of an update
    num_parameters: int
    phase: str = ""  # the phase of the run that is timed, if there are several
    peak_bytes: int = 0  # in a process of its own
    step_seconds: float = 0.0  # there
    extras: list[Extra] = field(default_factory=list)  # there

    @property
    def extra_seconds(self) -> float:
        """The share of each update in what only some have."""
        return sum(extra.seconds * extra.share for extra in self.extras)


def measure_step(bench: Bench) -> Result:
    """A row for each candidate's update of the same model. Raises ValueError for an unknown candidate, and for settings
    that the model does not allow."""
    usual = [name for name in USUAL["step"] if name not in TRANSFORMERS or importlib.util.find_spec("transformers")]
    names = list(compared(bench.config)) or bench.config.candidates or usual
    candidates = measure_each_alone(bench, describe_all(bench, names))
    state_bytes = 4 * sum(c.num_parameters for c in candidates) * bench.dtype.itemsize  # with gradients, two moments
    stays = state_bytes <= (free_bytes(bench.device) or math.inf) / 2  # the rest is for activations
    if not stays:
        logger.info("the models do not fit side by side: each is built for its turn")
    train = candidates[0].train
    ids = random_ids(bench, train)
    tasks = {c.name: step_task(partial(build_update, bench, c.name, c.train), ids, stays) for c in candidates}
    for task in tasks.values() if stays else ():
        task.before()  # outside the rounds
    sides = (train.model.intermediate_size, train.model.hidden_size)
    tasks["product"] = product_task(ids.numel(), sides, times=NUM_PRODUCTS, **bench.like)
    timings = in_turns(tasks, repeats=bench.config.repeats, deadline=bench.deadline)
    rows = step_rows(candidates, timings, ids.numel(), names[0] if compared(bench.config) else None)
    return rows, "\n".join([format_table(rows, COLUMNS), *notes(candidates)])


def train_config(bench: Bench, name: str) -> TrainConfig:
    """The configuration that a candidate trains with. Raises ValueError."""
    config = bench.config
    named = {**STEP_CANDIDATES, **compared(config)}
    if name not in named and name not in METHODS.names():
        known = ", ".join(dict.fromkeys([*STEP_CANDIDATES, *METHODS.names()]))
        raise ValueError(f"candidates: {name} is unknown to what=step; choose from {known}")
    block_size = "null" if config.block_size is None else config.block_size
    overrides = [text.format(block_size=block_size) for text in named.get(name, (f"method={name}",))]
    overrides += [f"global_batch_size={config.batch}", f"micro_batch_size={config.batch}"]
    overrides += ["lr=1e-4"]  # small: after a non-finite loss the update would be skipped
    typed = {"layer_path": config.layer_path, "rank": config.rank, "sparsity": config.sparsity}
    overrides += [f"{key}={value}" for key, value in typed.items() if value is not None]
    return bench.train_config(*overrides)


def describe_all(bench: Bench, names: list[str]) -> list[Candidate]:
    """The candidates. Of `all` methods or optimizers those that do not go with the model are left out, with a line."""
    found = []
    for name in names:
        try:
            found.append(describe(bench, name))
        except ValueError as error:
            if "all" not in (bench.config.methods, bench.config.optimizers) or not found:
                raise
            logger.info(f"left out: {name}; {error}")
    return found


def describe(bench: Bench, name: str) -> Candidate:
    """A candidate, from its model on the meta device; one of transformers, from ours of the same mathematics. Raises
    ValueError for settings that the model does not allow, and if transformers is needed and not installed."""
    if name in TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        raise ValueError(f"candidates: {name} needs transformers: run `pip install transformers`, or omit it")
    train = train_config(bench, name)
    for member in members(train.optimizer):
        member.check_package()
    model = build_model(train, vocab_size(train), bench.dtype)
    check_structures(train, model)
    phase, updates = longest_phase(train)
    change_until(train, model, updates[0] - 1)
    paths = set_paths(model, train.layer_path, bench.config.batch * train.seq_len, bench.device)
    path = None if name in TRANSFORMERS else " ".join(sorted(set(paths.values()))) or None
    share = len(updates) / num_steps(train)
    text = f"the {f'phase {phase}' if phase else 'first phase'}, {share:.0%} of the updates" if share < 1 else ""
    return Candidate(name, train, path, update_multiply_adds(model, train), count_parameters(model)["total"], text)


def update_multiply_adds(model: nn.Module, train: TrainConfig) -> int:
    """Multiply-adds of the products of an update in full rows, by the method's mathematics, not by how it is computed;
    with what activation checkpointing computes again."""
    shape, head = train.model, linear_multiply_adds(model.get_submodule("lm_head"))
    attention = attention_multiply_adds(shape.num_hidden_layers, shape.hidden_size, train.seq_len)
    layers = linear_multiply_adds(model) - head + attention
    of_a_token = (4 if train.activation_checkpointing else 3) * layers + 3 * head
    return train.global_batch_size * train.seq_len * of_a_token


def random_ids(bench: Bench, train: TrainConfig) -> Tensor:
    """Full rows (batch, seq_len): padding would not be computed."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size(train), (bench.config.batch, train.seq_len), generator=generator).to(bench.device)


# ---- measuring


def measure_each_alone(bench: Bench, candidates: list[Candidate]) -> list[Candidate]:
    """Measure each candidate in a process of its own, and return those measured. After the first LEAST_CANDIDATES, the
    default candidates stop when only enough time remains for the rounds. Raises ValueError if a process was killed."""
    for number, candidate in enumerate(candidates):
        rounds = (1 + MIN_REPEATS) * sum(other.step_seconds for other in candidates)
        is_usual = bench.config.candidates is None and not compared(bench.config)
        is_optional = is_usual and number >= LEAST_CANDIDATES
        if is_optional and time.monotonic() + rounds > bench.deadline:
            names = ", ".join(other.name for other in candidates[number:])
            logger.info(f"skipped: {names}; time_limit_s leaves no time for it (candidates=[...] measures it anyway)")
            return candidates[:number]
        try:
            alone = run_alone(_alone_here, bench.config, candidate.name)
            candidate.peak_bytes, candidate.step_seconds, candidate.extras = alone
        except BrokenProcessPool as error:
            advice = "probably for lack of memory; lower batch or seq_len, or omit it"
            raise ValueError(f"the process of {candidate.name} was killed, {advice}") from error
        seconds, peak = candidate.step_seconds, candidate.peak_bytes / 1e9
        logger.info(f"{candidate.name}: {seconds:.2f} s a step, peak {peak:.2f} GB, alone")
    return candidates


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new interpreter, so that the peak of memory is its own (a forked process would start
    with that of this one). Raises what the function raises, and BrokenProcessPool if the process was killed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BaseException:
            for child in multiprocessing.active_children():  # do not wait for the update after SIGTERM
                child.terminate()
            raise


def _alone_here(config: BenchConfig, name: str) -> tuple[int, float, list[Extra]]:
    """What `measure_update` finds out about a candidate in this process."""
    bench = start_bench(config)
    train, memory = train_config(bench, name), PeakMemory(bench.device)
    return measure_update(bench, name, train, random_ids(bench, train), memory.peak_bytes)


def step_task(build: Callable[[], Update], ids: Tensor, stays: bool) -> Task:
    """One update of a model that stays from turn to turn, or that is built before and released after each. A first,
    tiny update allocates the optimizer state."""
    built: list[Update] = []

    def before() -> None:
        if not built:
            built.append(build())
            built[0](ids[:1, :8])

    def run() -> None:
        built[0](ids)

    def after() -> None:
        if not stays:
            built.clear()
            gc.collect()

    return Task(run, before, after)


def step_rows(
    candidates: list[Candidate], timings: dict[str, Measurement], num_tokens: int, base: str | None = None
) -> list[Row]:
    """A row for each candidate, compared with `base`, or else with `full` and the published layer if those were
    measured."""
    by_name = {candidate.name: candidate for candidate in candidates}
    whole = {c.name: Measurement(1, [t + c.extra_seconds for t in timings[c.name].times], NO_SPEC) for c in candidates}
    full, published = by_name.get(DENSE), by_name.get(PUBLISHED)
    rows = []
    for name, candidate in by_name.items():
        seconds = whole[name].median
        row: Row = {
            "measured": name,
            "path": candidate.path,
            **compare(timings[name], timings.get(DENSE)),
            "extra_seconds": candidate.extra_seconds or None,
            "extras": [asdict(extra) for extra in candidate.extras],
            "tokens_per_second": num_tokens / seconds,
            "peak_memory_bytes": candidate.peak_bytes,
            "parameters": candidate.num_parameters,
            "floor_seconds": candidate.multiply_adds * timings["product"].median,
        }
        if base is not None:
            ratios = [a / b for a, b in zip(whole[name].times, whole[base].times, strict=True)]
            row |= {"ratio": seconds / whole[base].median, "ratio_spread": Measurement(1, ratios, NO_SPEC).iqr / 2}
        elif full is not None:
            speedup, limit = whole[DENSE].median / seconds, full.multiply_adds / candidate.multiply_adds
            row |= {"speedup_over_dense": speedup, "limit": limit, "share_of_limit": speedup / limit}
        if published is not None:
            row["speedup_over_published"] = whole[PUBLISHED].median / seconds
            row["memory_over_published"] = candidate.peak_bytes / published.peak_bytes
        rows.append(row)
    return rows


def notes(candidates: list[Candidate]) -> list[str]:
    """What the table must say of phases, and of what only some updates have."""
    lines = [""]
    for each in candidates:
        more = (f"{e.name} {write(e.seconds, 'time')} every {1 / e.share:,.0f} updates" for e in each.extras)
        parts = [part for part in (each.phase, *more) if part]
        lines += [f"{each.name}: {', '.join(parts)}."] if parts else []
    return lines if len(lines) > 1 else []


COLUMNS: list[Column] = [
    ("measured", "measured", ""),
    ("path", "path", ""),
    ("seconds", "time", "time"),
    ("spread", "+-", ".0%"),
    ("extra_seconds", "and between", "time"),
    ("ratio", "ratio", ".2f"),
    ("ratio_spread", "+-", ".2f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("speedup_over_dense", "speed-up over full", ".2f"),
    ("limit", "all products", ".2f"),
    ("share_of_limit", "share of that", ".0%"),
    ("speedup_over_published", "over published", ".2f"),
    ("peak_memory_bytes", "peak memory", "bytes"),
    ("memory_over_published", "memory over published", ".2f"),
]
