"""Perplexity is weighted by tokens; the published protocol's number is recomputed here as its harness does."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sltrain.engine.distributed import Ranks
from sltrain.engine.evaluate import evaluate

ONE = Ranks(0, 1, torch.device("cpu"))


class CostsItsIds(nn.Module):
    """A model whose token losses are the token ids: every mean is known."""

    def forward(self, input_ids: Tensor, labels: Tensor, rows: Tensor | None) -> Tensor:
        targets = labels[:, 1:]
        return targets[targets != -100].float().sum()


@dataclass
class Rows:
    input_ids: Tensor
    labels: Tensor
    num_bytes: int
    positions: Tensor | None = None


def rows(*lengths_and_ids: tuple[int, int]) -> Rows:
    ids = torch.zeros(len(lengths_and_ids), 8, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (length, token) in enumerate(lengths_and_ids):
        ids[row, :length] = labels[row, :length] = token
    return Rows(ids, labels, num_bytes=5 * len(lengths_and_ids))


BATCHES = [rows((8, 1), (2, 3)), rows((3, 2)), rows((1, 7))]  # token losses: 7 x 1, 1 x 3; 2 x 2; none


def test_numbers() -> None:
    numbers = evaluate(CostsItsIds(), BATCHES, ONE)
    assert numbers is not None
    assert (numbers["eval_tokens"], numbers["eval_processes"]) == (10, 1)
    assert numbers["loss"] == pytest.approx(14 / 10)
    assert numbers["perplexity"] == pytest.approx(math.exp(1.4))
    assert numbers["bits_per_byte"] == pytest.approx(14 / math.log(2) / 15)

    total_batches, total_loss = 1, 0.0  # as `evaluate_model` of the published code counts
    for mean in (10 / 8, 4 / 2):
        total_batches += 1
        total_loss += mean
    assert numbers["perplexity_galore_protocol"] == pytest.approx(math.exp(total_loss / total_batches))


def test_model_keeps_its_mode() -> None:
    model = CostsItsIds().train()
    evaluate(model, BATCHES, ONE)
    assert model.training


def test_stop_gives_no_number() -> None:
    assert evaluate(CostsItsIds(), BATCHES, ONE, should_stop=lambda: True) is None


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="validation_path"):
        evaluate(CostsItsIds(), [rows((1, 7))], ONE)


def test_two_ranks_with_the_same_batches_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank divides by its own n + 1, as the published harness does; a rank without a batch does not count."""
    alone = evaluate(CostsItsIds(), BATCHES, ONE)
    two = Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr(two, "sum_", lambda totals: 2 * totals)
    both = evaluate(CostsItsIds(), BATCHES, two)
    assert alone is not None and both is not None
    assert both["eval_tokens"] == 2 * alone["eval_tokens"] and both["eval_processes"] == 2
    for key in ("perplexity", "perplexity_galore_protocol", "bits_per_byte"):
        assert both[key] == pytest.approx(alone[key])
    monkeypatch.setattr(two, "sum_", lambda totals: totals)
    assert evaluate(CostsItsIds(), BATCHES, two) == alone
