"""The update that `what=step` times: that of `sltrain-train` on a new model, in the longest phase of its run.

Actions that follow every update of the phase (engine/actions.py) are part of it. What only some updates have, other
actions and what an optimizer renews every `update_every` updates, is timed apart: an update with it less one without.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import benchmark

from sltrain.benchmarks.base import SEED, Bench, vocab_size
from sltrain.benchmarks.published import PublishedLinear
from sltrain.benchmarks.timing import Task, fill_zeros
from sltrain.building.model import allocate, build_model, dtype_name
from sltrain.building.phases import Live, live_actions, phases_of
from sltrain.building.trainer import build_step, build_updates
from sltrain.config import TrainConfig, num_steps
from sltrain.engine.actions import Action, Schedule, begun, generator_for
from sltrain.engine.distributed import Ranks
from sltrain.engine.strategy import Single
from sltrain.formats.folder import llama_config
from sltrain.layers.convert import replace_linears
from sltrain.layers.cost import set_paths
from sltrain.models.llama import is_projection

PUBLISHED = "transformers_published"
TRANSFORMERS = ("transformers", PUBLISHED)  # candidates that train a model of transformers
COUNT = itertools.count(1)  # of all updates, as a model may be built anew for each
SPREAD = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly over [0, 1)

Update = Callable[[Tensor], float]  # trains a model on ids (rows, tokens) and returns the loss


@dataclass(frozen=True)
class Extra:
    """What only some updates have."""

    name: str
    seconds: float  # each time; 0 where it is lost in the noise
    share: float  # of the updates


def longest_phase(train: TrainConfig) -> tuple[str, range]:
    """Name and updates, from 1, of the phase with most of them; the first has no name."""
    begins = [("", 0), *((phase.name, phase.after) for phase in phases_of(train))]
    ends = [*(after for _, after in begins[1:]), num_steps(train)]
    parts = [(name, range(after + 1, end + 1)) for (name, after), end in zip(begins, ends, strict=True)]
    return max(parts, key=lambda part: len(part[1]))


def build_update(bench: Bench, name: str, train: TrainConfig) -> Update:
    """The update of a candidate; for a model of transformers, a plain training loop with the same optimizer."""
    if name not in TRANSFORMERS:
        return OurUpdate(bench, train)
    model = transformers_model(bench, name, train)
    fill_zeros(model)
    optimizer = build_updates(train, model, Single(Ranks(rank=0, world_size=1, device=bench.device)))

    def update(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return update


class OurUpdate:
    """An update with the actions that follow every one; `rare` are the others, and the share of updates they follow."""

    def __init__(self, bench: Bench, train: TrainConfig) -> None:
        strategy = Single(Ranks(rank=0, world_size=1, device=bench.device))
        self.numbers = longest_phase(train)[1]
        model = our_model(bench, train)
        fill_zeros(model)
        optimizer = build_updates(train, model, strategy)
        self.step = build_step(train, model, optimizer, strategy)
        actions = live_actions(train, model, Live(optimizer))
        shares = [(action, sum(map(action.is_due, self.numbers)) / len(self.numbers)) for action in actions]
        self.usual = Schedule([action for action, share in shares if share == 1], seed=SEED)
        self.rare = [(action, share) for action, share in shares if 0 < share < 1]

    def __call__(self, ids: Tensor, rare: Action | None = None) -> float:
        """Make an update, one after which `rare` is due if it is given. Their numbers are spread over the phase, as
        what an action does may depend on when it is. Raises ValueError if the update was skipped."""
        due = self.numbers if rare is None else list(filter(rare.is_due, self.numbers))
        number = due[int(next(COUNT) * SPREAD % 1 * len(due))]
        schedule = self.usual if rare is None else Schedule([*self.usual.actions, rare], seed=SEED)
        before = partial(schedule.before_step, number)
        inputs = [(ids, ids, None)]
        result = self.step.run(inputs, ids[:, 1:].numel(), before_step=before)
        if result.skipped:
            raise ValueError("a gradient was not finite, so the update was skipped and its time says nothing; omit it")
        self.step.optimizer.zero_grad(set_to_none=True)
        schedule.run(number, lambda: inputs)
        return result.loss


def measure_update(
    bench: Bench, name: str, train: TrainConfig, ids: Tensor, peak_bytes: Callable[[], int]
) -> tuple[int, float, list[Extra]]:
    """Peak bytes of this process with a candidate, seconds of an update, and what only some updates have."""
    update = build_update(bench, name, train)
    seconds, extras = fastest(update, ids), list[Extra]()

    def add(what: str, slower: Update, share: float) -> None:
        extras.append(Extra(what, max(0.0, fastest(slower, ids) - seconds), share))

    if isinstance(update, OurUpdate):
        for action, share in update.rare:
            add(action.name, partial(update, rare=action), share)
    peak, interval = peak_bytes(), getattr(train.optimizer, "update_every", 1)
    if interval > 1:
        del update
        options: Any = replace(train.optimizer, update_every=1)  # type: ignore[call-arg]
        add("renewal", build_update(bench, name, replace(train, optimizer=options)), 1 / interval)
    return peak, seconds, extras


def fastest(update: Update, ids: Tensor) -> float:
    """Seconds of the faster of two updates, after a tiny one that allocates the optimizer's state."""
    update(ids[:1, :8])

    def run() -> None:
        update(ids)

    return min(Task(run).seconds(benchmark.timer) for _ in range(2))


def our_model(bench: Bench, train: TrainConfig) -> nn.Module:
    """The initialized model of `sltrain-train` in its longest phase."""
    model = build_model(train, vocab_size(train), bench.dtype)
    allocate(model, bench.device)
    model.init_weights(SEED)
    for phase in begun(phases_of(train), longest_phase(train)[1][0] - 1):
        if phase.after > 0:  # build_model knows the others
            phase.change(model)
        with torch.no_grad():
            phase.start(model, generator_for(SEED, phase.name, phase.after))
    set_paths(model, train.layer_path, bench.config.batch * train.seq_len, bench.device)
    return model


def transformers_model(bench: Bench, name: str, train: TrainConfig) -> nn.Module:
    """transformers' LLaMA of the same shape, its projections dense or as published."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = llama_config(asdict(train.model), vocab_size(train), dtype_name(bench.dtype), {})
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**shape))

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return PublishedLinear(linear.in_features, linear.out_features, train.rank, train.sparsity, train.alpha)

    if name == PUBLISHED:
        replace_linears(model, is_projection, make)
    return model.to(**bench.like)
