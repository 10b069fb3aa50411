"""One update: the loss is the mean over all tokens, whatever the micro-batches; what is not finite changes nothing."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.config import ModelConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.engine.step import OrdinaryStep
from sltrain.engine.strategy import whole_strategy
from sltrain.layers import SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection

ONE = whole_strategy(Ranks(0, 1, torch.device("cpu")))


class Bigram(nn.Module):
    """Predicts the next token from this one; returns the summed loss as the engine expects."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.table(input_ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Six rows of very different lengths."""
    ids = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, length in enumerate((9, 2, 3, 9, 5, 2)):
        labels[row, length:] = -100
    return ids, labels


def num_targets(labels: Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_are_weighted_by_tokens(rows: int, batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = Bigram().double()
    reference = copy.deepcopy(model)
    ids, labels = batch
    loss = F.cross_entropy(reference.table(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()

    micro_batches = list(zip(ids.split(rows), labels.split(rows), strict=True))
    step = OrdinaryStep(model, torch.optim.SGD(model.parameters(), lr=0.1), ONE)
    result = step.run(micro_batches, num_targets(labels))
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(reference.table.weight.grad.norm().item(), rel=1e-6)
    torch.testing.assert_close(model.table.weight, reference.table.weight)


def test_clipping_bounds_the_update_and_reports_the_norm_before(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = Bigram()
    before = model.table.weight.detach().clone()
    step = OrdinaryStep(model, torch.optim.SGD(model.parameters(), lr=1.0), ONE, grad_clip=0.01)
    result = step.run([batch], num_targets(batch[1]))
    assert result.grad_norm > 0.01
    assert (model.table.weight - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_clipping_by_parameter_bounds_each_gradient(batch: tuple[Tensor, Tensor]) -> None:
    """Against torch's own clipping, one parameter after the other; the reported norm is the one before."""

    class TwoTables(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(11))

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return super().forward(input_ids, labels) + 1e-3 * self.bias.sum()

    torch.manual_seed(0)
    model = TwoTables()
    reference = copy.deepcopy(model)
    count = num_targets(batch[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = OrdinaryStep(model, optimizer, ONE, grad_clip_per_parameter=0.01).run([batch], count)
    (reference(*batch) / count).backward()
    norms = [torch.nn.utils.clip_grad_norm_(parameter, 0.01) for parameter in reference.parameters()]
    torch.optim.SGD(reference.parameters(), lr=1.0).step()
    assert norms[1] > 0.01 > norms[0] > 0
    assert result.grad_norm == pytest.approx(torch.stack(norms).norm().item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_update_that_is_not_finite_is_skipped_and_named(batch: tuple[Tensor, Tensor]) -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.weight[3, 3] = float("inf")
    before = model.table.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    named: list[str] = []
    result = OrdinaryStep(model, optimizer, ONE).run([batch], num_targets(batch[1]), named.append)
    assert result.skipped
    assert named == ["gradient of table.weight"]
    assert torch.equal(model.table.weight, before)
    assert not optimizer.state


@pytest.mark.parametrize("finite", [True, False])
def test_before_the_step_the_clipped_gradients_are_there_unless_it_is_skipped(
    finite: bool, batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Bigram()
    if not finite:
        torch.nn.init.constant_(model.table.weight, float("inf"))
    before = model.table.weight.detach().clone()
    step = OrdinaryStep(model, torch.optim.SGD(model.parameters(), lr=1.0), ONE, grad_clip=0.01)
    seen: list[float] = []

    def look() -> None:
        assert torch.equal(model.table.weight, before) and model.table.weight.grad is not None
        assert not step.is_whole, "what it changes belongs to no whole number of updates"
        seen.append(model.table.weight.grad.norm().item())

    step.run([batch], num_targets(batch[1]), before_step=look)
    assert seen == ([pytest.approx(0.01, rel=1e-3)] if finite else [])


class Sum(nn.Module):
    """Gradients are known: one for `ones`, and 1/4 for `quarters`, whatever the input."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.ones, self.quarters = (nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.ones.float() + self.quarters.float() / 4).sum()


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16() -> None:
    """Gradients of norm sqrt(n) and sqrt(n) / 4, of which bfloat16 would keep three digits."""
    n = 1004
    model = Sum(n)
    result = OrdinaryStep(model, torch.optim.SGD(model.parameters(), lr=1.0), ONE).run([(torch.zeros(1),)], 1)
    assert model.ones.grad is not None and model.ones.grad.dtype == torch.bfloat16
    assert result.grad_norm == pytest.approx(n**0.5 * 17**0.5 / 4, rel=1e-6)
    assert abs(torch.tensor(n**0.5).bfloat16().item() / n**0.5 - 1) > 1e-3, "this n tells the two apart"


def test_an_update_that_breaks_off_leaves_weights_that_are_not_whole(batch: tuple[Tensor, Tensor]) -> None:
    """The loop then must not save. Before the optimizer moves anything, an error leaves them whole."""
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = OrdinaryStep(model, optimizer, ONE)
    with pytest.raises(TypeError):
        step.run([(batch[0],)], 1)  # no labels
    assert step.is_whole
    step.run([batch], num_targets(batch[1]))
    assert step.is_whole
    hook = optimizer.register_step_post_hook(lambda *_: torch.empty(10**15))
    with pytest.raises(RuntimeError):
        step.run([batch], num_targets(batch[1]))
    assert not step.is_whole
    hook.remove()


@pytest.mark.parametrize("path", ["dense", "composed", "factored"])
@pytest.mark.parametrize(
    "clip", [{}, {"grad_clip": 0.5}, {"grad_clip_per_parameter": 0.5}], ids=["free", "by norm", "by parameter"]
)
def test_an_update_reads_one_pair_of_numbers_from_its_device(
    clip: dict[str, float], path: str, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are no numbers: whatever asks for one, or for a shape that depends on one, fails. On a
    GPU each would be a wait."""
    meta = torch.device("meta")
    shape = ModelConfig("test", 32, 48, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    with meta:
        model = LlamaForCausalLM(shape)
        if path != "dense":
            replace_linears(model, is_projection, lambda name, linear: SLTrainLinear(*linear_shape(linear), path=path))
    reads: list[torch.Size] = []
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or [1.0, 1.0])
    micro_batches = [make_micro_batch(ids, labels, meta) for ids, labels in [batch, (batch[0], batch[0])]]
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    OrdinaryStep(model, optimizer, whole_strategy(Ranks(0, 1, meta)), **clip).run(micro_batches, 50)
    assert reads == [(2,)]
    assert all(parameter in optimizer.state for parameter in model.parameters())


def linear_shape(linear: nn.Linear) -> tuple[int, int, int, float, float]:
    return linear.in_features, linear.out_features, 4, 0.1, 8.0


class Grows(nn.Module):
    """y = the sum of all outputs; another layer may join."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.add(4)

    def add(self, size: int) -> None:
        before = self.layers[-1].out_features if len(self.layers) else 3
        self.layers.append(nn.Linear(before, size, dtype=torch.float64))
        for parameter in self.layers[-1].parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(self.layers)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def train_growing(ranks: Ranks) -> tuple[list[Tensor], list[int], bool]:
    """An update before and one after a layer joins, as building/trainer.py does it: the weights, the bytes of DDP's
    buckets in each, and whether those of the first are freed."""
    rows = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = [(each,) for each in rows[ranks.rank :: ranks.world_size]]
    model, bucket_bytes = Grows(), []
    for _ in range(2):
        step = OrdinaryStep(model, torch.optim.SGD(model.parameters(), lr=1e-3), whole_strategy(ranks))
        step.run(batches, num_targets=10)
        bucket_bytes.append(step.bucket_bytes)
        ddp, _ = weakref.ref(step.model), step.close()
        if len(model.layers) == 1:
            is_freed = ddp() is None
            model.add(6)
    return [p.detach() for p in model.parameters()], bucket_bytes, is_freed


def test_ddp_follows_a_model_that_gets_parameters(on_two_ranks: Callable[..., list[Any]]) -> None:
    whole, none, _ = train_growing(ONE.ranks)
    assert none == [0, 0]
    for weights, bucket_bytes, is_freed in on_two_ranks(train_growing):
        torch.testing.assert_close(weights, whole)
        assert bucket_bytes == [8 * (3 * 4 + 4), 8 * (3 * 4 + 4 + 4 * 6 + 6)] and is_freed


class SquaredSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum()


def train_stopped(ranks: Ranks, at: int) -> list[Tensor]:
    """The weights after four updates; those after `at` are made by a new step, as a run that continues makes them."""
    generator = torch.Generator().manual_seed(ranks.rank)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)), SquaredSum())
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    step = OrdinaryStep(model, optimizer, whole_strategy(ranks))
    for number in range(4):
        if number == at:
            step.close()
            step = OrdinaryStep(model, optimizer, whole_strategy(ranks))
        step.run([(torch.randn(3, 40, generator=generator),)], num_targets=10)
    return [parameter.detach() for parameter in model.parameters()]


def test_three_ranks_continue_with_the_sums_of_a_run_that_never_stopped(on_two_ranks: Callable[..., list[Any]]) -> None:
    for stopped, straight in on_two_ranks(lambda ranks: [train_stopped(ranks, at) for at in (2, 4)], 3):
        assert all(map(torch.equal, stopped, straight))
