"""What is timed is training, floors count what torch counts, and any method can be a candidate."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.flop_counter import FlopCounterMode

from sltrain.benchmarks import step, update
from sltrain.benchmarks.base import Bench
from sltrain.benchmarks.published import PublishedLinear
from sltrain.benchmarks.settings import compared
from sltrain.benchmarks.step import Candidate, describe, measure_step, run_alone, step_rows, step_task, train_config
from sltrain.engine.actions import Action, Moment, Phase, Running, at, every
from sltrain.layers.base import ReplacedLinear
from sltrain.layers.convert import replace_linears
from sltrain.layers.kinds.relora import ReLoRALinear
from sltrain.methods.base import METHODS, Method
from sltrain.optim.kinds.galore import GaLore

STEP = ["what=step", "model=llama_tiny", "batch=2", "seq_len=16", "repeats=2", "device=cpu", "time_limit_s=600"]
IDS = torch.zeros(2, 16, dtype=torch.int64)


def build(subject: Bench, name: str) -> Callable[[torch.Tensor], float]:
    return update.build_update(subject, name, train_config(subject, name))


# ---- candidates


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new interpreter does not know a method of a test."""
    monkeypatch.setattr(step, "run_alone", lambda function, *arguments: function(*arguments))


@pytest.fixture
def scaled() -> Iterator[None]:
    """A method that no file knows: every projection is an nn.Linear, and nothing is replaced by anything else."""

    @METHODS.register("scaled")
    @dataclass
    class Scaled(Method):
        def replace(self, model: nn.Module, chosen: Callable[[str, nn.Linear], bool]) -> list[str]:
            def make(name: str, linear: nn.Linear) -> nn.Module:
                made = nn.Linear(linear.in_features, linear.out_features, False, linear.weight.device)
                made.weight = nn.Parameter(torch.empty_like(linear.weight))
                return made

            return replace_linears(model, chosen, make)

    yield
    METHODS._classes.pop("scaled")


@pytest.mark.usefixtures("scaled", "in_this_process")
def test_a_method_that_this_package_has_never_heard_of_is_a_candidate(bench: Callable[..., Bench]) -> None:
    full, scaled = measure_step(bench(*STEP, "candidates=[full,scaled]"))[0]
    assert (full["measured"], scaled["measured"]) == ("full", "scaled")
    assert scaled["limit"] == 1 and scaled["parameters"] == full["parameters"] and scaled["seconds"] > 0


def test_candidates_are_what_they_are_called(bench: Callable[..., Bench]) -> None:
    subject = bench(*STEP, "block_size=16", "rank=8", "sparsity=0.2")
    assert train_config(subject, "full").method.name == train_config(subject, "transformers").method.name == "full"
    block = train_config(subject, "block")
    assert (block.method.name, block.support, block.block_size, block.rank) == ("sltrain", "block", 16, 8)
    assert (block.sparsity, block.global_batch_size, block.seq_len) == (0.2, 2, 16)
    assert train_config(subject, "checkpointing").activation_checkpointing
    uniform = train_config(subject, "uniform")
    assert (uniform.support, uniform.block_size, uniform.activation_checkpointing) == ("uniform", None, False)
    published = update.transformers_model(subject, "transformers_published", train_config(subject, "uniform"))
    assert sum(isinstance(module, PublishedLinear) for module in published.modules()) == 4 * 7
    ours = update.our_model(subject, uniform)
    assert sum(isinstance(module, ReplacedLinear) for module in ours.modules()) == 4 * 7


@pytest.mark.parametrize("name", ["full", "low_rank", "transformers"])
def test_the_floor_counts_the_products_that_torch_counts(name: str, bench: Callable[..., Bench]) -> None:
    subject = bench(*STEP)
    run = build(subject, name)
    with FlopCounterMode(display=False) as counter:
        run(torch.randint(4096, (2, 16)))
    # torch counts attention as if every position saw all others; ours is apart: layers * hidden * (1 + ... + 16) * 2
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 3 * 2 * 4 * 128 * 2 * sum(range(1, 17))
    without_targets = 3 * 2 * 128 * 4096  # a head may skip the last position of each row
    assert describe(subject, name).multiply_adds - attention - products // 2 in (0, without_targets)


def test_the_floor_counts_s_and_what_is_recomputed(bench: Callable[..., Bench]) -> None:
    subject = bench(*STEP, "sparsity=0.5")
    work = {name: describe(subject, name).multiply_adds for name in ("low_rank", "uniform", "checkpointing")}
    num_nonzero = 4 * (4 * 128 * 128 + 3 * 128 * 352) // 2
    assert work["uniform"] - work["low_rank"] == 3 * 32 * num_nonzero
    head = 3 * 32 * 128 * 4096
    assert 3 * (work["checkpointing"] - head) == 4 * (work["uniform"] - head)


@pytest.mark.parametrize("name", ["uniform", "column", "transformers_published"])
def test_updates_learn(name: str, bench: Callable[..., Bench]) -> None:
    """What is timed is training: the loss of the same rows falls."""
    run = build(bench(*STEP), name)
    ids = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = [run(ids) for _ in range(4)]
    assert losses[-1] < losses[0]


# ---- between updates


@dataclass
class Acts:
    """What an action of a test method did, by the numbers of updates."""

    before: list[int]
    after: list[int]


@pytest.fixture
def acting() -> Iterator[Acts]:
    """A dense method with an action after every update and one after every 100, half of it before the optimizer's step;
    phases begin at 40 and 390 of 400 updates."""
    acts = Acts([], [])

    @METHODS.register("acting")
    @dataclass
    class Acting(Method):
        def replace(self, model: nn.Module, chosen: Callable[[str, nn.Linear], bool]) -> list[str]:
            return ["all"]

        def phases(self, max_steps: int) -> list[Phase]:
            return [Phase("middle", 40, lambda model: None), Phase("end", 390, lambda model: None)]

        def actions(self, running: Running) -> list[Action]:
            def rest(moment: Moment | None = None) -> None:
                acts.before.append(0) if moment is None else acts.after.append(moment.step)

            often = Action("often", every(1), lambda moment: acts.after.append(-moment.step))
            return [often, Action("seldom", every(100), rest, before=rest), Action("never", at(400), rest)]

    yield acts
    METHODS._classes.pop("acting")


def test_what_some_updates_have_is_timed_apart_in_the_longest_phase(
    bench: Callable[..., Bench], acting: Acts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only `seldom` moves, a second before and one after the optimizer's step."""
    clock = lambda: len(acting.before) + sum(number > 0 for number in acting.after)  # noqa: E731
    monkeypatch.setattr(update.benchmark, "timer", clock)
    subject = bench(*STEP, "methods=[acting]")
    train = train_config(subject, "acting")
    assert update.longest_phase(train) == ("middle", range(41, 391))
    peak, seconds, (seldom,) = update.measure_update(subject, "acting", train, IDS, lambda: len(acting.after))
    assert (seldom.name, seldom.seconds, seldom.share, seconds) == ("seldom", 2, 3 / 350, 0)
    assert len(acting.before) == 3 and [n for n in acting.after if n > 0].count(400) == 0
    assert {n for n in acting.after if n > 0} <= {100, 200, 300}
    often = [-n for n in acting.after if n < 0]
    assert len(often) == 6 and len(set(often[:3])) == 3 and set(often) <= set(range(41, 391))
    assert peak == 9  # read when all of it was done
    described = describe(subject, "acting")
    assert described.phase == "the phase middle, 88% of the updates"
    described.extras = [seldom]
    assert step.notes([described])[1] == f"acting: {described.phase}, seldom 2.00 s every 117 updates."


def test_a_renewal_of_directions_is_timed_apart(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves with each matrix whose directions are renewed."""
    renewed, choose = list[int](), GaLore.new_basis

    def counted(self: GaLore, grad: torch.Tensor, number: int) -> torch.Tensor:
        renewed.append(number)
        return choose(self, grad, number)

    monkeypatch.setattr(GaLore, "new_basis", counted)
    monkeypatch.setattr(update.benchmark, "timer", lambda: len(renewed))
    subject = bench(*STEP, "rank=8", "optimizers=[galore,apollo_mini]", "method=full")
    train = train_config(subject, "galore")
    assert (train.optimizer.name, train.method.name) == ("galore", "full")
    extras = update.measure_update(subject, "galore", train, IDS, lambda: 0)[2]
    assert extras == [update.Extra("renewal", seconds=4 * 7, share=1 / 200)]
    assert update.measure_update(subject, "adamw", train_config(subject, "adamw"), IDS, lambda: 0)[2] == []


def test_a_phase_is_timed_with_its_layers(bench: Callable[..., Bench]) -> None:
    subject = bench(*STEP, "methods=[relora,slope]", "rank=8")
    model = update.our_model(subject, train_config(subject, "relora"))
    assert sum(isinstance(module, ReLoRALinear) for module in model.modules()) == 4 * 7
    relora, slope = describe(subject, "relora"), describe(subject, "slope")
    assert relora.num_parameters < describe(subject, "full").num_parameters
    assert relora.phase == "the phase adapters, 75% of the updates"
    assert slope.phase == "the first phase, 99% of the updates"


@pytest.mark.usefixtures("in_this_process", "acting")
def test_all_methods_and_optimizers_of_the_registry(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    every_one = bench(*STEP, "methods=all")
    methods = [found.name for found in step.describe_all(every_one, list(compared(every_one.config)))]
    assert methods[0] == "full" and sorted(methods) == METHODS.names()
    with caplog.at_level("INFO"):
        every_one = bench(*STEP, "optimizers=all", "rank=8")
        optimizers = [c.name for c in step.describe_all(every_one, list(compared(every_one.config)))]
    assert optimizers[0] == "adamw" and {"galore", "muon", "scale"} <= set(optimizers)
    assert "spectron" not in optimizers and "left out: spectron; optimizer=spectron takes none" in caplog.text
    with pytest.raises(ValueError, match="spectron takes none"):
        measure_step(bench(*STEP, "optimizers=[spectron]"))


def test_a_skipped_update_is_no_measurement(bench: Callable[..., Bench]) -> None:
    run = build(bench(*STEP), "full")
    next(run.step.model.parameters()).data.fill_(math.nan)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not finite"):
        run(IDS)


def test_ratios_are_over_the_base_and_count_what_some_updates_have() -> None:
    times = {"adamw": [2.0, 4.0, 2.0], "galore": [3.0, 5.0, 3.0], "product": [1.0]}
    timings = {name: Measurement(1, each, TaskSpec(name, "")) for name, each in times.items()}
    galore = candidate("galore")
    galore.extras = [update.Extra("renewal", 200.0, 1 / 200)]
    first, second = step_rows([candidate("adamw"), galore], timings, 8, "adamw")
    assert (first["ratio"], first["ratio_spread"], first["extra_seconds"]) == (1, 0, None)
    assert second["extras"] == [{"name": "renewal", "seconds": 200.0, "share": 1 / 200}]
    assert (second["ratio"], second["extra_seconds"], second["seconds"]) == (2, 1, 3)  # (3 + 1) / 2, 6 / 4
    assert second["ratio_spread"] == pytest.approx(0.125)  # quartiles of 2, 1.5, 2
    assert second["tokens_per_second"] == 2 and "speedup_over_dense" not in second


# ---- measuring


def candidate(name: str, multiply_adds: int = 1, peak: int = 0) -> Candidate:
    return Candidate(name, train=None, path=None, multiply_adds=multiply_adds, num_parameters=6, peak_bytes=peak)


def test_a_model_is_built_once_if_it_stays_and_for_each_turn_if_not() -> None:
    done: list[str] = []

    def make() -> Any:
        done.append("build")
        return lambda ids: done.append(str(tuple(ids.shape)))

    for stays, expected in (
        (True, ["build", "(1, 8)", "(2, 16)", "(2, 16)"]),
        (False, ["build", "(1, 8)", "(2, 16)"] * 2),
    ):
        done.clear()
        task = step_task(make, IDS, stays)
        for _ in range(2):
            task.before(), task.run(), task.after()
        assert done == expected


def test_the_last_candidates_are_skipped_when_time_is_over(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "run_alone", lambda function, config, name: (100, 0.5, []))
    subject = bench(*STEP[:-1], "time_limit_s=1e-9")
    done = step.measure_each_alone(subject, [candidate(name) for name in "abcde"])
    assert [(c.name, c.peak_bytes) for c in done] == [("a", 100), ("b", 100), ("c", 100)]
    asked = bench(*STEP[:-1], "time_limit_s=1e-9", "candidates=[a,b,c,d,e]")
    assert len(step.measure_each_alone(asked, [candidate(name) for name in "abcde"])) == 5
    asked = bench(*STEP[:-1], "time_limit_s=1e-9", "methods=all")
    assert len(step.measure_each_alone(asked, [candidate(name) for name in "abcde"])) == 5


def test_a_process_of_its_own_answers_fails_or_is_killed(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_alone(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        run_alone(int, "x")

    def killed(*arguments: Any) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(step, "run_alone", killed)
    with pytest.raises(ValueError, match="the process of a was killed.*lower batch"):
        step.measure_each_alone(bench(*STEP), [candidate("a")])


def test_a_killed_process_does_not_hang() -> None:
    with pytest.raises(BrokenProcessPool):
        run_alone(os._exit, 3)


def test_rows_compare_with_dense_and_with_the_published_layer() -> None:
    seconds = {
        "full": [3.0, 3.0, 9.0],
        "uniform": [2.5, 2.5, 0.1],
        "transformers_published": [5.0] * 3,
        "product": [0.01],
    }
    timings = {name: Measurement(1, times, TaskSpec(name, "")) for name, times in seconds.items()}
    candidates = [
        candidate("full", 300, 300),
        candidate("uniform", 200, 100),
        candidate("transformers_published", 200, 400),
    ]
    row = {row["measured"]: row for row in step_rows(candidates, timings, num_tokens=50)}["uniform"]
    assert row["ratio_to_dense"] == pytest.approx(2.5 / 3)
    assert (row["speedup_over_dense"], row["speedup_over_published"]) == (pytest.approx(1.2), 2)
    assert (row["limit"], row["share_of_limit"], row["floor_seconds"]) == (1.5, pytest.approx(0.8), pytest.approx(2))
    assert (row["tokens_per_second"], row["peak_memory_bytes"], row["memory_over_published"]) == (20, 100, 0.25)
    (alone,) = step_rows([candidate("uniform")], timings | {"uniform": timings["uniform"]}, 50)
    assert "limit" not in alone and "speedup_over_published" not in alone
