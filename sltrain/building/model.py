"""Config -> model: LLaMA with the method's layers, on meta memory, and then on a device."""

import dataclasses
from collections.abc import Collection

import torch
from torch import nn

from sltrain.building.parametrization import set_starts
from sltrain.config import TrainConfig, num_steps
from sltrain.engine.actions import begun
from sltrain.models.llama import LlamaForCausalLM, is_projection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """As it is typed: bfloat16."""
    return str(dtype).removeprefix("torch.")


def build_model(config: TrainConfig, vocab_size: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model with the method's layers in place, as it is before the first update, on the meta device: shapes without
    memory."""
    shape = dataclasses.replace(config.model, vocab_size=vocab_size)
    compute_dtype = torch.bfloat16 if config.precision == "mixed" else None
    with torch.device("meta"):
        model = LlamaForCausalLM(shape, config.activation_checkpointing, compute_dtype, config.z_loss)
    model.to(dtype)
    config.method.replace(model, is_projection)
    set_starts(config, model)
    for phase in begun(config.method.phases(num_steps(config)), 0):
        phase.change(model)
    return model


def weight_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of a run's weights, gradients and moments."""
    return torch.float32 if config.precision == "mixed" else pick_dtype(config.dtype, device)


def precision_name(weights: torch.dtype, arithmetic: torch.dtype) -> str:
    """As a reader should see it: bfloat16, or mixed where the weights are wider than the arithmetic."""
    return dtype_name(weights) if weights == arithmetic else "mixed"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA, float32 on the CPU, where bfloat16 products are many times slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta memory on its device. Raises ValueError if there is not enough."""
    allocate_own(list(model.modules()), device)


def allocate_own(modules: Collection[nn.Module], device: torch.device) -> None:
    """The same for the tensors of these modules, not for those of modules inside of them."""
    own = [tensor for module in modules for tensor in (*module.parameters(False), *module.buffers(False))]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in own)
    try:
        for module in modules:
            module.to_empty(device=device, recurse=False)
    except RuntimeError as error:  # torch's allocators, out of memory
        raise ValueError(
            f"the model's {num_bytes / 1e9:,.1f} GB do not fit on {device}; choose a smaller one"
        ) from error
