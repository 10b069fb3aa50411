"""A model in shards trains as a whole one does, holds its share of the bytes, and its checkpoints are those of one
process."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from small_run import method_of
from torch import Tensor, nn

from sltrain.building.model import allocate_own
from sltrain.building.trainer import compile_model
from sltrain.config import ModelConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.ema import Average
from sltrain.engine.evaluate import evaluate
from sltrain.engine.memory import bytes_of, held_by
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.engine.sharded import Settings, Sharded
from sltrain.engine.shards import gather_rows, rows_of
from sltrain.engine.step import OrdinaryStep, PerLayerStep
from sltrain.engine.strategy import Replicated, Single, Strategy
from sltrain.methods.advice import weight_norms
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.optim.build import build_optimizer
from sltrain.optim.kinds.adamw import AdamWOptions
from sltrain.optim.named_state import OptimizerState
from sltrain.optim.per_unit import PerUnitUpdate

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    name="small",
    hidden_size=20,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=53,
)
NUM_ROWS, STEPS = 12, 3
OnRanks = Callable[..., list[Any]]


def built(strategy: Strategy) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A model of SLTrain's layers with its first values, as a run builds it, and AdamW."""
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    method_of("sltrain", rank=4, alpha=8.0, sparsity=0.1, support="uniform").replace(model, is_projection)

    def prepare(modules: Collection[nn.Module]) -> None:
        allocate_own(modules, CPU)
        model.init_weights(0, modules)

    if strategy.is_sharded:
        strategy.shard(model, list(model.model.layers), prepare)
    else:
        prepare(set(model.modules()))
    strategy.agree(model)
    options = AdamWOptions(name="adamw")
    named = strategy.named_parameters(model)
    return model, build_optimizer(named, options, lr=0.01, weight_decay=0.1, device=CPU)


def rows_of_step(step: int) -> Tensor:
    return torch.randint(53, (NUM_ROWS, 9), generator=torch.Generator().manual_seed(step))


def trained(strategy: Strategy, steps: int = STEPS, **clip: float) -> dict[str, Any]:
    """Losses and norms of some updates of two or more micro-batches, and what is left of them."""
    model, optimizer = built(strategy)
    update = OrdinaryStep(model, optimizer, strategy, **clip)
    results = []
    for step in range(steps):
        ids = rows_of_step(step)[strategy.ranks.rank :: strategy.ranks.world_size]
        results.append(update.run([make_micro_batch(each, each, CPU) for each in ids.split(1)], NUM_ROWS * 8))
    optimizer.zero_grad()
    norms = weight_norms(model, strategy.whole)
    contents = strategy.for_checkpoint(steps, model, {"optimizer": OptimizerState(optimizer, [])}, {})
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "weight_norms": norms,
        "tensors": {name: tensor.detach().clone() for name, tensor in contents.tensors.items()},
        "state": contents.objects["optimizer"]["state"],
        "held": held_by(model, optimizer, strategy) - bytes_of(model.buffers()),
    }


@pytest.mark.parametrize(("num_rows", "shape"), [(1, ()), (7, (3,)), (9, ()), (2, (2, 2))])
def test_rows_are_cut_as_torch_chunks_them(num_rows: int, shape: tuple[int, ...], on_two_ranks: OnRanks) -> None:
    tensor = torch.arange(num_rows * (torch.Size(shape).numel())).view(num_rows, *shape).to(torch.bfloat16)
    chunks = [*tensor.chunk(3), *[tensor[:0]] * 3][:3]
    parts = [tensor[rows_of(num_rows, position, 3)] for position in range(3)]
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=True))

    def gather(ranks: Ranks) -> list[Tensor | None]:
        group = torch.distributed.group.WORLD
        assert group is not None
        part = parts[ranks.rank]
        return [gather_rows(part, num_rows, group), gather_rows(part, num_rows, group, to=1)]

    for rank, (everywhere, at_one) in enumerate(on_two_ranks(gather, 3)):
        assert torch.equal(everywhere, tensor)
        assert torch.equal(at_one, tensor) if rank == 1 else at_one is None


@pytest.mark.parametrize(
    ("world_size", "settings", "clip"),
    [
        (2, Settings(), {"grad_clip": 0.3}),
        (3, Settings(reduces_each_micro_batch=False), {"grad_clip_per_parameter": 0.05}),
        (4, Settings(replicas=2, reshard_after_forward=False), {}),
    ],
)
def test_shards_train_as_one_process(
    world_size: int, settings: Settings, clip: dict[str, float], on_two_ranks: OnRanks
) -> None:
    alone = trained(Single(Ranks(0, 1, CPU)), **clip)
    ranks = on_two_ranks(lambda ranks: trained(Sharded(ranks, settings), **clip), world_size)
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert found["weight_norms"] == pytest.approx(alone["weight_norms"], rel=1e-5)
    first = ranks[0]
    assert first["tensors"].keys() == alone["tensors"].keys() and first["state"].keys() == alone["state"].keys()
    for name, tensor in alone["tensors"].items():
        torch.testing.assert_close(first["tensors"][name], tensor, atol=1e-4, rtol=0)
    for name, state in alone["state"].items():
        assert int(first["state"][name]["step"]) == STEPS
        torch.testing.assert_close(first["state"][name]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-3)


def test_first_values_are_those_of_one_process_and_each_rank_holds_its_share(on_two_ranks: OnRanks) -> None:
    alone = trained(Single(Ranks(0, 1, CPU)), steps=0)
    found = on_two_ranks(lambda ranks: trained(Sharded(ranks, Settings()), steps=0), 4)
    for name, tensor in alone["tensors"].items():
        assert torch.equal(found[0]["tensors"][name], tensor), name
    assert max(each["held"] for each in found) <= 0.27 * alone["held"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_state_goes_to_any_number_of_ranks_and_back_unchanged(world_size: int, on_two_ranks: OnRanks) -> None:
    """As checkpoints of one process, of two and of three open each other."""
    model, optimizer = built(Single(Ranks(0, 1, CPU)))
    OrdinaryStep(model, optimizer, Single(Ranks(0, 1, CPU))).run([make_micro_batch(*[rows_of_step(0)] * 2, CPU)], 96)
    saved = OptimizerState(optimizer, []).state_dict()

    def there_and_back(ranks: Ranks) -> dict[str, Any]:
        strategy = Sharded(ranks, Settings())
        model, optimizer = built(strategy)
        objects = {"optimizer": OptimizerState(optimizer, [])}
        strategy.from_checkpoint(objects)["optimizer"].load_state_dict(saved)
        return strategy.for_checkpoint(1, model, objects, {}).objects["optimizer"]

    found = on_two_ranks(there_and_back, world_size)[0]
    assert found["class"] == saved["class"] and found["state"].keys() == saved["state"].keys()
    for name, state in saved["state"].items():
        assert all(torch.equal(found["state"][name][key], value) for key, value in state.items()), name


class Batch:
    num_bytes, source, positions = 50, "", None

    def __init__(self, ids: Tensor) -> None:
        self.input_ids = self.labels = ids


def test_averaged_weights_of_an_evaluation_are_not_trained_on(on_two_ranks: OnRanks) -> None:
    """Also where a layer's gathered weights stay after forward."""

    def loss_after_evaluation(strategy: Strategy) -> float:
        model, optimizer = built(strategy)
        average = Average(model, 0.9, strategy.named_parameters(model))
        for value in average.values.values():
            value.mul_(2)
        with average.in_model():
            evaluate(model, [Batch(rows_of_step(1)[:2])], strategy.ranks, in_step=strategy.is_sharded)
            strategy.after_forward(model)
        step = OrdinaryStep(model, optimizer, strategy)
        return step.run([make_micro_batch(*[rows_of_step(0)] * 2, CPU)], strategy.ranks.world_size * 96).loss

    alone = loss_after_evaluation(Single(Ranks(0, 1, CPU)))
    kept = Settings(reshard_after_forward=False)
    losses = on_two_ranks(lambda ranks: loss_after_evaluation(Sharded(ranks, kept)))
    assert losses == pytest.approx([alone] * 2, abs=1e-5)


def test_ranks_with_fewer_batches_evaluate_in_step(on_two_ranks: OnRanks) -> None:
    batches = [Batch(rows_of_step(number)[:2]) for number in range(3)]

    def evaluated(ranks: Ranks) -> Any:
        strategy = Sharded(ranks, Settings())
        model, _ = built(strategy)
        found = evaluate(model, batches[2 * ranks.rank : 2 * ranks.rank + 2], ranks, in_step=True)
        strategy.after_forward(model)
        stopped = evaluate(model, batches, ranks, lambda: ranks.rank == 1, in_step=True)
        return found, stopped

    model, _ = built(Single(Ranks(0, 1, CPU)))
    alone = evaluate(model, batches, Ranks(0, 1, CPU))
    assert alone is not None
    for found, stopped in on_two_ranks(evaluated):
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert found["eval_tokens"] == alone["eval_tokens"] and stopped is None


def test_a_gradient_that_is_not_finite_is_named_on_every_rank(on_two_ranks: OnRanks) -> None:
    def run(ranks: Ranks) -> tuple[str | None, bool]:
        strategy = Sharded(ranks, Settings())
        model, optimizer = built(strategy)
        name, weight = list(strategy.named_parameters(model))[-1]  # the head
        if ranks.rank == 1:
            weight.data[-1, 0] = float("inf")
        before = weight.detach().clone()
        result = OrdinaryStep(model, optimizer, strategy).run([make_micro_batch(*[rows_of_step(0)] * 2, CPU)], 96)
        return result.not_finite, torch.equal(weight, before)

    names, kept = zip(*on_two_ranks(run), strict=True)
    assert names[0] == names[1] and names[0] is not None and all(kept)


@pytest.mark.slow
def test_layers_are_compiled_one_by_one(on_two_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the part of the compiler that traces; it takes a second instead of a minute."""
    compile_layer = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer: compile_layer(layer, backend="aot_eager"))

    def losses(ranks: Ranks, compiles: bool) -> list[float]:
        strategy = Sharded(ranks, Settings())
        model, optimizer = built(strategy)
        step = OrdinaryStep(compile_model(model, strategy) if compiles else model, optimizer, strategy)
        batches = [rows_of_step(number)[ranks.rank :: ranks.world_size] for number in range(STEPS)]
        found = [step.run([make_micro_batch(ids, ids, CPU)], NUM_ROWS * 8).loss for ids in batches]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        with strategy.by_modules(model), torch.no_grad():
            hidden = model.model(rows_of_step(0)[:1, :5])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        return [*found, float(hidden.norm())]

    graphs = list[int]()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # of other tests in this process

    def run(ranks: Ranks) -> tuple[list[float], list[float], list[int]]:
        return losses(ranks, False), losses(ranks, True), graphs

    for eager, compiled, num_graphs in on_two_ranks(run):
        assert compiled == pytest.approx(eager, abs=1e-5)
        assert num_graphs[:2] == [0, 0] and 1 <= num_graphs[2] <= 2 * CONFIG.num_hidden_layers
        assert num_graphs[3] == num_graphs[2], "other shapes are not compiled for"


def inside_backward(ranks: Ranks, settings: Settings, clip: float | None) -> tuple[Any, ...]:
    """Three updates by the ordinary step and inside backward; before the last one of these a micro-batch of rank 1 is
    bad. Weights and results of both; whenever the optimizer steps, of how many units there are gradients, which share
    a piece of memory; and the number of units."""
    sides = []
    for _ in range(2):
        strategy = Sharded(ranks, settings)
        sides.append((strategy, *built(strategy)))
    (strategy, model, optimizer), (ours, mine, inner) = sides
    ordinary = OrdinaryStep(model, optimizer, strategy, grad_clip_per_parameter=clip)
    per_unit = PerUnitUpdate(inner, ours.units, ours.take, ours.whole_norms, clip)
    step = PerLayerStep(mine, per_unit, ours)
    held: list[int] = []

    def grads() -> list[Tensor]:
        return [ours.part(p.grad)[0] for p in tensors if p.grad is not None]

    tensors = [p for p in (*mine.parameters(), *(local for _, local in ours.named_parameters(mine)))]
    inner.register_step_pre_hook(lambda *_: held.append(len({g.untyped_storage().data_ptr() for g in grads()})))
    results = []
    for number in range(STEPS):
        ids = rows_of_step(number)[ranks.rank :: ranks.world_size].split(2)
        batch = [make_micro_batch(each, each, CPU) for each in ids]
        if number == 2:
            name, head = list(ours.named_parameters(mine))[-1]
            good, head.data[-1, 0] = head.detach().clone(), torch.inf
            before = [local.detach().clone() for _, local in ours.named_parameters(mine)]
            assert step.run(batch, NUM_ROWS * 8).not_finite == "loss"
            after = [local.detach() for _, local in ours.named_parameters(mine)]
            assert all(map(torch.equal, before, after)) and not grads()
            head.data.copy_(good)
        results.append((ordinary.run(batch, NUM_ROWS * 8), step.run(batch, NUM_ROWS * 8)))
    weights = [[local.detach() for _, local in s.named_parameters(m)] for s, m in ((strategy, model), (ours, mine))]
    return weights, results, held, len(ours.units)


@pytest.mark.parametrize(
    ("settings", "clip"),
    [(Settings(), 0.05), (Settings(reduces_each_micro_batch=False), None), (Settings(replicas=2), None)],
)
def test_an_update_inside_backward_is_the_ordinary_one(
    settings: Settings, clip: float | None, on_two_ranks: OnRanks
) -> None:
    """Bit for bit, while gradients of one unit at most are held. With several micro-batches those of the others wait,
    where each micro-batch is summed."""
    for (theirs, ours), results, held, num_units in on_two_ranks(lambda ranks: inside_backward(ranks, settings, clip)):
        assert all(map(torch.equal, theirs, ours))
        for ordinary, inside in results:
            assert inside.loss == ordinary.loss and inside.num_skipped_tensors == 0 and not inside.skipped
            assert inside.grad_norm == pytest.approx(ordinary.grad_norm, rel=1e-5)
        assert len(held) == STEPS * num_units
        assert max(held) == (num_units if settings.reduces_each_micro_batch else 1)


def test_indices_that_differ_are_named(on_two_ranks: OnRanks) -> None:
    def run(ranks: Ranks) -> str:
        strategy = Sharded(ranks, Settings())
        model, _ = built(strategy)
        name, indices = next(iter(model.named_buffers()))
        if ranks.rank == 1:
            indices.view(-1).view(torch.uint8)[0] ^= 1
        try:
            strategy.agree(model)
        except ValueError as error:
            return f"{name}: {error}"
        return "nothing"

    for said in on_two_ranks(run):
        name, _, error = said.partition(": ")
        assert error.startswith(f"{name} was drawn differently on rank 0 and rank 1")


def test_ddp_and_one_process_know_no_shards() -> None:
    for strategy in (Single(Ranks(0, 1, CPU)), Replicated(Ranks(0, 2, CPU))):
        tensor = nn.Parameter(torch.ones(3))
        assert strategy.part(tensor) == (tensor, None) and not strategy.is_sharded
