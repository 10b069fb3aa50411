"""Mixed precision is pure bfloat16 on weights that are rounded from float32 ones: its loss is that model's, bit for
bit, its gradients are float32 and as good."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sltrain.building.model import allocate, build_model
from sltrain.compose import TRAIN, compose_config
from sltrain.layers.cost import set_paths
from sltrain.models.generation import Sampling, generate
from sltrain.models.llama import LlamaForCausalLM

CPU = torch.device("cpu")
SHAPE = (
    "model=llama_tiny data=stdlib model.hidden_size=64 model.intermediate_size=96 model.num_attention_heads=4"
    " model.num_key_value_heads=2 model.num_hidden_layers=2 rank=8 sparsity=0.1"
).split()
METHODS = [
    "layer_path=factored",
    "layer_path=composed",
    "layer_path=factored support=block",
    "method=low_rank",
    "method=full",
]


def make(how: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = compose_config([*SHAPE, *how.split()], TRAIN)
    model = build_model(config, 100, dtype)
    allocate(model, CPU)
    model.init_weights(0)
    set_paths(model, config.layer_path, 64, CPU)
    for name, parameter in model.named_parameters():  # no zero B, no gain of 1
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(0.02 * noise.to(dtype))
    return model


def copy_of(model: LlamaForCausalLM, how: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Of the weights rounded to bfloat16."""
    other = make(how, dtype)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(its.bfloat16())
    return other


class Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.__name__ for word in ("mm", "attention", "linear")):
            self.dtypes |= {
                leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.ndim > 1
            }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [8, 64])  # few and many, for the loss
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_is_bfloat16_on_rounded_weights(method: str, checkpointing: str, rows: int) -> None:
    how = f"{method} activation_checkpointing={checkpointing}"
    mixed = make(f"{how} precision=mixed", torch.float32)
    pure, exact = copy_of(mixed, how, torch.bfloat16), copy_of(mixed, how, torch.float32)
    ids = torch.randint(100, (2, rows // 2), generator=torch.Generator().manual_seed(1))
    with Products() as products:
        loss = mixed(ids, ids)
        loss.backward()
    assert products.dtypes - {torch.float32} == {torch.bfloat16}
    expected = pure(ids, ids)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    expected.backward()
    exact(ids, ids).backward()
    for (name, mine), of_pure, of_exact in zip(
        mixed.named_parameters(), pure.parameters(), exact.parameters(), strict=True
    ):
        assert mine.dtype == mine.grad.dtype == torch.float32, name
        true = of_exact.grad.norm()
        errors = [(gradient.float() - of_exact.grad).norm() / true for gradient in (mine.grad, of_pure.grad)]
        assert errors[0] < 0.05 and errors[0] <= 1.1 * errors[1] + 1e-3, (name, errors)


def test_mixed_precision_generates_as_bfloat16_and_loads_as_float32() -> None:
    mixed = make("precision=mixed", torch.float32)
    pure = copy_of(mixed, "", torch.bfloat16)
    texts = [list(generate(model, [1, 2, 3], 20, 0, Sampling())) for model in (mixed, pure)]
    assert texts[0] == texts[1] and len(texts[0]) > 5
    with torch.no_grad():
        assert mixed(torch.tensor([[1, 2]])).dtype == torch.bfloat16
