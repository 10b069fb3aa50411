"""Decoding with a cache gives the logits of a pass over the whole prefix."""

import pytest
import torch

from sltrain.config import ModelConfig
from sltrain.layers import SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.cache import KeyValueCache
from sltrain.models.llama import LlamaForCausalLM, is_projection

T = 40


def make_model(num_kv_heads: int | None = None, kind: str = "dense") -> LlamaForCausalLM:
    config = ModelConfig(
        name="test",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        vocab_size=60,
        rope_theta=50.0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if kind == "sltrain":
        replace_linears(
            model,
            is_projection,
            lambda name, linear: SLTrainLinear(linear.in_features, linear.out_features, 4, 0.2, 8, path="factored"),
        )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.15, generator=generator)
    return model.requires_grad_(False)


def some_ids(num_sequences: int = 1, length: int = T) -> torch.Tensor:
    return torch.randint(60, (num_sequences, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("kind", ["dense", "sltrain"])
@pytest.mark.parametrize("prompt_length", [1, 7])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_every_position_is_what_the_whole_prefix_gives(
    num_kv_heads: int | None, kind: str, prompt_length: int, num_sequences: int
) -> None:
    model, ids = make_model(num_kv_heads, kind), some_ids(num_sequences)
    cache = KeyValueCache()
    parts = [ids[:, :prompt_length], *(ids[:, t : t + 1] for t in range(prompt_length, T))]
    read = 0
    for part in parts:
        hidden = model.model(part, cache=cache).view(num_sequences, part.shape[1], -1)
        read += part.shape[1]
        assert cache.num_positions == read
        whole = model(ids[:, :read])[:, read - part.shape[1] :]
        torch.testing.assert_close(model.lm_head(hidden), whole, atol=1e-5, rtol=1e-5)
    assert model(ids).std() > 0.1  # and these are no zeros


def test_what_came_before_is_seen_and_where_it_stood() -> None:
    model, ids = make_model(), some_ids()

    def last(prompt: torch.Tensor) -> torch.Tensor:
        cache = KeyValueCache()
        model.model(prompt, cache=cache)
        return model.model(torch.tensor([[5]]), cache=cache)

    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 60
    swapped = ids[:, torch.tensor([1, 0, *range(2, T)])]
    assert (last(ids) - last(other)).abs().max() > 1e-4
    assert (last(ids) - last(swapped)).abs().max() > 1e-4


def test_a_cache_belongs_to_one_generation() -> None:
    model, ids = make_model(2), some_ids()
    before = model(ids)
    first, second = KeyValueCache(), KeyValueCache()
    model.model(ids, cache=first)
    model.model(ids[:, :3], cache=second)
    hidden = model.model(ids[:, 3:4], cache=second)
    torch.testing.assert_close(model.lm_head(hidden), model(ids[:, :4])[:, -1], atol=1e-5, rtol=1e-5)
    assert (first.num_positions, second.num_positions) == (T, 4)
    assert torch.equal(model(ids), before)  # nothing is left in the model


def test_layers_keep_their_own() -> None:
    """Keys and values are kept with as many heads as there are, and grow along the positions."""
    cache = KeyValueCache()
    one, two = torch.nn.Identity(), torch.nn.Identity()
    a, b = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 1, 8)
    cache.extend(one, a, -a)
    cache.extend(two, 2 * a, 3 * a)
    keys, values = cache.extend(one, b, -b)
    assert torch.equal(keys, torch.cat([a, b], dim=2)) and torch.equal(values, -keys)
    keys, values = cache.extend(two, b, b)
    assert torch.equal(keys[:, :, :5], 2 * a) and torch.equal(values[:, :, :5], 3 * a)


def test_several_positions_are_not_added_to_a_filled_cache() -> None:
    model, ids = make_model(), some_ids()
    cache = KeyValueCache()
    model.model(ids[:, :4], cache=cache)
    with pytest.raises(AssertionError, match="one position at a time"):
        model.model(ids[:, 4:6], cache=cache)
