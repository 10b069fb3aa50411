"""What is picked has the distribution of transformers' own logits processors."""

import math

import pytest
import torch
import transformers

from sltrain.config import ModelConfig
from sltrain.models.generation import Sampling, generate, pick
from sltrain.models.llama import LlamaForCausalLM

EOS = 59


def make_model() -> LlamaForCausalLM:
    config = ModelConfig(
        name="test", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=60
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.4, generator=generator)
    return model.requires_grad_(False)


def probabilities(
    logits: torch.Tensor, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, int]:
    """What `pick` draws from, and what it drew."""
    seen: list[torch.Tensor] = []
    multinomial = torch.multinomial

    def spy(weights: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(weights.clone())
        return multinomial(weights, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", spy)
        token = pick(logits, sampling, torch.Generator().manual_seed(0))
    (weights,) = seen
    return (weights / weights.sum()).float(), token


def by_transformers(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    return warpers(None, logits[None].float())[0].softmax(0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 60, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 0.95, 1.0])
def test_the_distribution_is_transformers(
    temperature: float, top_k: int | None, top_p: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        logits = 3 * torch.randn(60, generator=torch.Generator().manual_seed(seed))
        sampling = Sampling(temperature, top_k, top_p)
        ours, token = probabilities(logits, sampling, monkeypatch)
        theirs = by_transformers(logits, sampling)
        assert torch.equal(ours > 1e-7, theirs > 1e-7)  # below, sums in float32 end at 1
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        assert theirs[token] > 0


def test_ties_at_the_kth_place_all_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    ours, _ = probabilities(logits, Sampling(1.0, top_k=2), monkeypatch)
    torch.testing.assert_close(ours, by_transformers(logits, Sampling(1.0, top_k=2)))
    assert (ours > 0).tolist() == [True, False, True, True, False]


def test_the_likeliest_always_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, token = probabilities(torch.tensor([0.0, 9.0, 1.0]), Sampling(1.0, top_p=1e-9), monkeypatch)
    assert ours.tolist() == [0, 1, 0] and token == 1


def test_draws_have_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    generator, sampling, n = torch.Generator().manual_seed(0), Sampling(0.8, top_k=4), 4000
    drawn = torch.tensor([pick(logits, sampling, generator) for _ in range(n)]).bincount(minlength=5) / n
    wanted = by_transformers(logits, sampling)
    assert drawn[3] == 0
    assert (drawn - wanted).abs().max() < 4 * math.sqrt(0.25 / n)


def test_temperature_0_is_the_likeliest() -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3))
    assert pick(logits, Sampling(), torch.Generator()) == int(logits.argmax())
    assert pick(logits.bfloat16(), Sampling(), torch.Generator()) == int(logits.bfloat16().argmax())


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-50, 1e-320])
def test_a_temperature_near_0_is_the_likeliest(temperature: float) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3))
    assert pick(logits, Sampling(temperature), torch.Generator().manual_seed(0)) == int(logits.argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits = torch.zeros(5)
    logits[2] = bad
    with pytest.raises(ValueError, match="not finite.*earlier step"):
        pick(logits, Sampling(temperature), torch.Generator())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": 1, "top_k": 0}, "top-k 0"),
        ({"temperature": 1, "top_k": -3}, "top-k -3"),
        ({"temperature": 1, "top_p": 0.0}, "top-p 0"),
        ({"temperature": 1, "top_p": 1.01}, "top-p 1.01"),
        ({"temperature": 1, "top_p": math.nan}, "top-p nan"),
        ({"top_k": 5}, "temperature 0"),
        ({"top_p": 0.5}, "temperature 0"),
    ],
)
def test_settings_that_pick_nothing(settings: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Sampling(**settings)


# ---- texts


def continued(model: LlamaForCausalLM, prompt: list[int], count: int, sampling: Sampling, eos: int = -1) -> list[int]:
    return list(generate(model, prompt, count, eos, sampling))


def greedy_by_hand(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_takes_the_likeliest_after_the_whole_prefix() -> None:
    model = make_model()
    for prompt in ([1], [4, 8, 15, 16, 23, 42]):
        found = continued(model, prompt, 25, Sampling())
        assert found == greedy_by_hand(model, prompt, 25)
        assert len(set(found)) > 5


def test_the_last_id_is_end_of_text() -> None:
    model = make_model()
    free = continued(model, [7, 3], 25, Sampling())
    eos = free[12]
    assert continued(model, [7, 3], 25, Sampling(), eos) == free[: free.index(eos) + 1]
    assert continued(model, [7, eos, 3], 5, Sampling(), eos)  # one in the prompt ends nothing


def test_a_seed_is_a_text() -> None:
    model = make_model()
    texts = [tuple(continued(model, [1, 2], 20, Sampling(1.0, seed=seed))) for seed in (0, 0, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 4
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert tuple(continued(model, [1, 2], 20, Sampling(1.0, seed=0))) == texts[0]
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator has no part in it
    assert tuple(continued(model, [1, 2], 20, Sampling(1.0, top_k=1, seed=5))) == tuple(
        continued(model, [1, 2], 20, Sampling())
    )


def test_one_token_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = make_model(), []
    model.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    texts = generate(model, [1, 2, 3], 5, EOS, Sampling())
    assert lengths == []
    next(texts)
    assert lengths == [3]  # it comes as it is made
    rest = list(texts)
    assert lengths == [3] + [1] * len(rest) and rest


def test_only_the_last_position_is_given_to_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = make_model(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    list(generate(model, [1, 2, 3], 2, -1, Sampling()))
    assert shapes == [(32,), (32,)]
