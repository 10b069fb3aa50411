"""One update: the loss is the mean over all tokens, whatever the micro-batches; what is not finite changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltrain.engine.distributed import Ranks
from sltrain.engine.step import train_step

ONE = Ranks(0, 1, torch.device("cpu"))


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
    result = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batches, num_targets(labels), ONE)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(reference.table.weight.grad.norm().item(), rel=1e-6)
    torch.testing.assert_close(model.table.weight, reference.table.weight)


def test_clipping_bounds_the_update_and_reports_the_norm_before(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = Bigram()
    before = model.table.weight.detach().clone()
    result = train_step(
        model, torch.optim.SGD(model.parameters(), lr=1.0), [batch], num_targets(batch[1]), ONE, grad_clip=0.01
    )
    assert result.grad_norm > 0.01
    assert (model.table.weight - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_update_that_is_not_finite_is_skipped_and_named(batch: tuple[Tensor, Tensor]) -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.weight[3, 3] = float("inf")
    before = model.table.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    named: list[str] = []
    result = train_step(model, optimizer, [batch], num_targets(batch[1]), ONE, on_skip=named.append)
    assert result.skipped
    assert named == ["gradient of table.weight"]
    assert torch.equal(model.table.weight, before)
    assert not optimizer.state
