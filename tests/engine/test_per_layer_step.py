"""An update inside backward equals the ordinary one; on two ranks it equals DDP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import make_optimizer
from torch import Tensor, nn

from sltrain.config import ModelConfig
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.step import OrdinaryStep, PerLayerStep, StepResult
from sltrain.engine.strategy import whole_strategy
from sltrain.layers import SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.optim.build import set_learning_rate
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.optim.named_state import OptimizerState
from sltrain.optim.per_layer import PerLayerUpdate

CPU = torch.device("cpu")
ONE = Ranks(0, 1, CPU)
ALONE = whole_strategy(ONE)
VOCAB = 64
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "device": CPU}
Fork = Callable[[Callable[[], None]], int]
Setting = tuple[Tensor | None, ...]


def build_model(path: str = "composed", dtype: torch.dtype = torch.float32, checkpoint: bool = False) -> nn.Module:
    """A decoder of two layers, embedding large enough for 8-bit states; `path` is how W x is computed."""
    shape = ModelConfig("test", 64, 80, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB)
    model = LlamaForCausalLM(shape, activation_checkpointing=checkpoint)
    if path != "dense":
        replace_linears(
            model,
            is_projection,
            lambda name, linear: SLTrainLinear(linear.in_features, linear.out_features, 8, 0.1, 8.0),
        )
    for module in model.modules():
        if isinstance(module, SLTrainLinear):
            module.reset_parameters(torch.Generator().manual_seed(1))
            module.path = path
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1, generator=generator)
    return model.to(dtype)


def micro_batches(step: int, number: int) -> list[Setting]:
    """`number` micro-batches of 2 rows x 12 tokens, those of `step`."""
    ids = torch.randint(VOCAB, (number, 2, 12), generator=torch.Generator().manual_seed(step))
    return [(each, each, None) for each in ids]


def num_targets(number: int) -> int:
    return number * 2 * 11


def build_ordinary(model: nn.Module, name: str = "adamw", **how: Any) -> torch.optim.Optimizer:
    if (package := OPTIMIZERS.load(name).package) is not None:
        pytest.importorskip(package)
    return make_optimizer(model.named_parameters(), name=name, **{**SETTINGS, **how})


def build_per_layer(
    model: nn.Module, ranks: Ranks = ONE, name: str = "adamw", clip: float | None = None, **how: Any
) -> PerLayerUpdate:
    return PerLayerUpdate(
        build_ordinary(model, name, **how),
        parameters=model.parameters(),
        reduce_grad=ranks.sum_ if ranks.world_size > 1 else None,
        grad_clip_per_parameter=clip,
    )


def assert_same_model(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_same_state(
    left: torch.optim.Optimizer, right: torch.optim.Optimizer, model: nn.Module, other: nn.Module
) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        for key, value in left.state[a].items():
            expected = right.state[b][key]
            same = torch.equal(value, expected) if isinstance(value, Tensor) else value == expected
            assert same, (name, key)


# ---- one process


@pytest.mark.parametrize("name", ["adamw", "adam8bit"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    ("path", "checkpoint"), [("dense", False), ("composed", True), ("factored", False), ("factored", True)]
)
def test_it_equals_the_ordinary_update_bit_for_bit(path: str, checkpoint: bool, number: int, name: str) -> None:
    model, reference = build_model(path, checkpoint=checkpoint), build_model(path, checkpoint=checkpoint)
    optimizer, ordinary = build_per_layer(model, name=name), build_ordinary(reference, name)
    for step in range(1, 4):
        for each in (optimizer, ordinary):
            set_learning_rate(each, 3e-3 / step)
        ours = PerLayerStep(model, optimizer, ALONE).run(micro_batches(step, number), num_targets(number))
        theirs = OrdinaryStep(reference, ordinary, ALONE).run(micro_batches(step, number), num_targets(number))
        assert ours.loss == theirs.loss and ours.num_skipped_tensors == 0 and not ours.skipped
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_same_model(model, reference)
    assert_same_state(optimizer, ordinary, model, reference)


@pytest.mark.parametrize("how", [{"stochastic_rounding": True}, {"stochastic_rounding": True, "name": "adam8bit"}, {}])
def test_it_equals_the_ordinary_update_in_bfloat16(how: dict[str, Any]) -> None:
    model, reference = build_model(dtype=torch.bfloat16), build_model(dtype=torch.bfloat16)
    optimizer, ordinary = build_per_layer(model, **how), build_ordinary(reference, **how)
    for step in range(1, 4):
        PerLayerStep(model, optimizer, ALONE).run(micro_batches(step, 2), num_targets(2))
        OrdinaryStep(reference, ordinary, ALONE).run(micro_batches(step, 2), num_targets(2))
    assert_same_model(model, reference)


def test_clipping_by_parameter_equals_the_ordinary_steps() -> None:
    model, reference, unclipped = build_model(), build_model(), build_model()
    optimizer, ordinary, free = build_per_layer(model, clip=0.1), build_ordinary(reference), build_ordinary(unclipped)
    for step in range(1, 4):
        batch = micro_batches(step, 1)
        ours = PerLayerStep(model, optimizer, ALONE).run(batch, num_targets(1))
        theirs = OrdinaryStep(reference, ordinary, ALONE, grad_clip_per_parameter=0.1).run(batch, num_targets(1))
        OrdinaryStep(unclipped, free, ALONE).run(batch, num_targets(1))
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5) and ours.grad_norm > 0.1
    assert_same_model(model, reference)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), unclipped.parameters(), strict=True))


class Spoiled(nn.Module):
    """A model whose loss is multiplied by a factor in the micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
        return self.model(ids, labels, None) * factor


def spoiled(batch: list[Setting], *factors: float) -> list[Setting]:
    return [(ids, labels, torch.tensor(factor)) for (ids, labels, _), factor in zip(batch, factors, strict=True)]


@pytest.mark.parametrize("factors", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_it_skips_an_update_whose_loss_is_not_finite(factors: tuple[float, ...]) -> None:
    model, reference = build_model(), build_model()
    optimizer = build_per_layer(model)
    named: list[str] = []
    batch = spoiled(micro_batches(1, 2), *factors)
    result = PerLayerStep(Spoiled(model), optimizer, ALONE).run(batch, num_targets(2), named.append)
    assert result.skipped and named == ["loss"] and not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_model(model, reference)


def test_update_of_bad_gradients_alone_is_skipped() -> None:
    """The loss is finite, its gradients are not: |x - x|^(1/2) at 0 has slope infinity."""
    model, reference = build_model(), build_model()
    optimizer = build_per_layer(model)
    named: list[str] = []

    class Cliff(nn.Module):
        def forward(self, *batch: Any) -> Tensor:
            loss = model(*batch)
            return loss + (loss - loss.detach()).abs().sqrt()

    batch = micro_batches(1, 2)
    result = PerLayerStep(Cliff(), optimizer, ALONE).run(batch, num_targets(2), named.append)
    num_gradients = len(list(model.parameters()))
    assert result.skipped and named == ["every gradient"] and result.num_skipped_tensors == num_gradients
    assert_same_model(model, reference)
    assert not optimizer.state


@pytest.mark.parametrize("how", [{}, {"name": "adam8bit", "stochastic_rounding": True}])
def test_resumed_run_equals_straight_run(how: dict[str, Any], tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: PerLayerUpdate, first: int, last: int) -> None:
        for step in range(first, last + 1):
            PerLayerStep(model, optimizer, ALONE).run(micro_batches(step, 2), num_targets(2))

    dtype = torch.bfloat16 if "stochastic_rounding" in how else torch.float32
    straight, first, second = (build_model(dtype=dtype) for _ in range(3))
    optimizers = [build_per_layer(model, **how) for model in (straight, first, second)]
    run(straight, optimizers[0], 1, 5)
    run(first, optimizers[1], 1, 3)
    objects = [{"optimizer": OptimizerState(each, dict(first.named_parameters()))} for each in optimizers[1:]]
    path = Checkpointer(tmp_path, 0).write(Contents.of(3, first, objects[0], {}))
    Checkpointer(tmp_path, 0).load(path, second, objects[1])
    run(second, optimizers[2], 4, 5)
    assert_same_model(straight, second)
    assert_same_state(optimizers[0], optimizers[2], straight, second)


# ---- two processes

TwoRanks = Callable[[Callable[[Ranks], Any]], list[Any]]


def run_per_layer(ranks: Ranks, number: int, **how: Any) -> tuple[dict[str, Tensor], list[StepResult]]:
    """Three updates of `number` micro-batches, divided among the ranks; the weights and the result of each update."""
    dtype = how.pop("dtype", torch.float32)
    model = build_model(dtype=dtype)
    optimizer = build_per_layer(model, ranks, **how)
    results = []
    for step in range(1, 4):
        batch = micro_batches(step, number)[ranks.rank :: ranks.world_size]
        results.append(PerLayerStep(model, optimizer, whole_strategy(ranks)).run(batch, num_targets(number)))
    return model.state_dict(), results


def run_ddp(ranks: Ranks, number: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[StepResult]]:
    model = build_model(dtype=dtype)
    ddp = OrdinaryStep(model, build_ordinary(model), whole_strategy(ranks))
    results = []
    for step in range(1, 4):
        batch = micro_batches(step, number)[ranks.rank :: 2]
        results.append(ddp.run(batch, num_targets(number)))
    return model.state_dict(), results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_equal_ddp(dtype: torch.dtype, on_two_ranks: TwoRanks) -> None:
    """Bit for bit: DDP's mean of gradients of twice the loss is the sum of those of the loss, as 2 is a power of 2."""
    answers = on_two_ranks(lambda ranks: (run_per_layer(ranks, 4, dtype=dtype), run_ddp(ranks, 4, dtype)))
    for (ours, our_results), (theirs, their_results) in answers:
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        for a, b in zip(our_results, their_results, strict=True):
            assert a.loss == b.loss and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


class Crossed(nn.Module):
    """Gradients come in opposite orders on the two ranks, of tensors of different sizes."""

    def __init__(self, is_reversed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) if i % 2 else nn.Linear(8, 8, bias=False) for i in range(6))
        self.is_reversed = is_reversed
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers) if self.is_reversed else self.layers:
            x = torch.tanh(layer(x))
        return x.sum()


def test_ranks_whose_gradients_come_in_other_orders(on_two_ranks: TwoRanks) -> None:
    def run(ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, reference = Crossed(ranks.rank == 1), Crossed(ranks.rank == 1)
        optimizer = build_per_layer(model, ranks)
        ddp = OrdinaryStep(reference, build_ordinary(reference), whole_strategy(ranks))
        for step in range(3):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(10 * step + ranks.rank))
            PerLayerStep(model, optimizer, whole_strategy(ranks)).run([(x,)], 6)
            ddp.run([(x,)], 6)
        return model.state_dict(), reference.state_dict()

    (first, ddp), (second, _) = on_two_ranks(run)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], ddp[name]) for name in first)


def test_bad_micro_batch_of_one_rank_skips_the_update_on_all(on_two_ranks: TwoRanks) -> None:
    def run(ranks: Ranks) -> list[tuple[dict[str, Tensor], StepResult]]:
        answers = []
        for factors in [(1.0, float("nan")), (float("inf"), 1.0)]:
            model = build_model()
            optimizer = build_per_layer(model, ranks)
            batch = spoiled(micro_batches(ranks.rank, 2), *(factors if ranks.rank else (1.0, 1.0)))
            step = PerLayerStep(Spoiled(model), optimizer, whole_strategy(ranks))
            answers.append((model.state_dict(), step.run(batch, 44)))
        return answers

    reference = build_model().state_dict()
    for answers in on_two_ranks(run):
        for weights, result in answers:
            assert result.skipped and result.num_skipped_tensors == 0
            assert all(torch.equal(weights[name], reference[name]) for name in reference)


def test_bad_gradient_of_one_rank(on_two_ranks: TwoRanks) -> None:
    """The sum is bad, so both ranks skip the tensor."""

    def run(ranks: Ranks) -> tuple[dict[str, Tensor], StepResult]:
        model = build_model()
        head = model.get_parameter("lm_head.weight")
        if ranks.rank == 1:
            head.register_hook(lambda grad: grad * float("nan"))
        optimizer = build_per_layer(model, ranks)
        result = PerLayerStep(model, optimizer, whole_strategy(ranks)).run(micro_batches(ranks.rank, 1), num_targets(2))
        return model.state_dict(), result

    (left, result), (right, _) = on_two_ranks(run)
    assert result.num_skipped_tensors == 1 and not result.skipped
    assert all(torch.equal(left[name], right[name]) for name in left)
    before = build_model().state_dict()
    assert [name for name, _ in build_model().named_parameters() if torch.equal(left[name], before[name])] == [
        "lm_head.weight"
    ]
