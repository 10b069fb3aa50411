"""Likelihoods beside log_softmax over the logits of a whole forward pass, one text at a time, in float64."""

import pytest
import torch

from sltrain.config import ModelConfig
from sltrain.models.llama import LlamaForCausalLM
from sltrain.models.scoring import Passage, batches, passage, score, windows

V = 60


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = ModelConfig(
        name="test", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=V
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.4, generator=generator)
    return model.requires_grad_(False)


def expected(model: LlamaForCausalLM, item: Passage) -> tuple[float, bool]:
    logits = model(torch.tensor([item.ids]))[0].double().log_softmax(-1)
    places = range(len(item.ids) - item.num_scored, len(item.ids))
    picked = [logits[place - 1, item.ids[place]] for place in places]
    return float(sum(picked)), all(int(logits[place - 1].argmax()) == item.ids[place] for place in places)


def passages(model: LlamaForCausalLM) -> list[Passage]:
    """Of many lengths, one of which the model would write itself."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for length, num_scored in [(2, 1), (9, 3), (30, 29), (9, 1), (17, 5), (3, 2)]:
        ids = torch.randint(V, (length,), generator=generator).tolist()
        made.append(Passage(ids, num_scored))
    greedy = [5, 6, 7]
    for _ in range(4):
        greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
    return [*made, Passage(greedy, 4)]


def test_likelihoods_are_those_of_a_whole_forward_pass(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sltrain.models.scoring.default_chunk_rows", lambda *_: 7)  # several chunks
    items = passages(model)
    found = score(model, items)
    for item, likelihood in zip(items, found, strict=True):
        log_probability, is_greedy = expected(model, item)
        assert likelihood.log_probability == pytest.approx(log_probability, abs=2e-5)
        assert likelihood.is_greedy == is_greedy
    assert [likelihood.is_greedy for likelihood in found][-1] and not all(item.is_greedy for item in found)


def test_batches_hold_every_passage_once_and_no_more_than_fits(model: LlamaForCausalLM) -> None:
    items = passages(model)
    for most in (1, 20, 40, 1000):
        dealt = batches(items, most)
        assert sorted(number for batch in dealt for number in batch) == list(range(len(items)))
        sizes = [len(batch) * max(len(items[number].ids) - 1 for number in batch) for batch in dealt]
        assert all(size <= most or len(batch) == 1 for size, batch in zip(sizes, dealt, strict=True))
    assert len(batches(items, 1)) == len(items) and len(batches(items, 1000)) == 1


def test_the_beginning_of_a_context_that_is_too_long_is_dropped() -> None:
    assert passage([1, 2, 3], [4, 5], 10) == Passage([1, 2, 3, 4, 5], 2)
    assert passage([1, 2, 3], [4, 5], 3) == Passage([2, 3, 4, 5], 2)  # it reads three and predicts the last
    assert passage([1, 2], [3, 4, 5, 6], 3) == Passage([3, 4, 5, 6], 3)


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 14, 20])
def test_windows_score_each_id_once_with_as_much_context_as_fits(length: int) -> None:
    ids = list(range(100, 100 + length))
    longest = 7
    scored = []
    for item in windows(0, ids, longest):
        assert len(item.ids) <= longest + 1 and item.num_scored < len(item.ids)
        scored += item.ids[-item.num_scored :]
        begin = len(scored) - item.num_scored
        assert item.ids == [0, *ids][max(len(scored) - longest, 0) : len(scored) + 1] and begin % longest == 0
    assert scored == ids
