"""Model FLOPs utilisation (MFU): the arithmetic that training needs, over what the device could do in that time
(Chowdhery et al., PaLM, arXiv 2204.02311, appendix B).

    FLOPs of a token = 6 x (multiply-adds of projections and head + layers x hidden x (T + 1))
    TFLOPS           = tokens a second x FLOPs of a token / devices / 1e12
    MFU              = TFLOPS / peak TFLOPS of the device

A multiply-add is two operations, and a product x W^T has two more of its size in backward, hence 6. Causal attention
multiplies scores and values with the positions up to each token's own, which is hidden x (T + 1) multiply-adds a token
and layer in full rows of T (PaLM's formula has twice that: every position with the whole row). What activation
checkpointing computes again is not counted.

A replaced projection counts by its method's mathematics (`multiply_adds` in layers/base.py): SLTrain's as B, A and the
entries of S, also where a dense W is multiplied on the way. Its MFU says which share of the device does the work that
the method needs, and is low beside dense's where a step is not shorter by as much as it has less to do. A frozen
matrix (relora's W0) counts as a trained one, though it has no gradient of its own.

Tokens are those that are not pads, the same as in tokens_per_second: the model skips pads, and they are no useful work.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sltrain.models.llama import LlamaForCausalLM, TiedHead

# Dense bfloat16 peaks with float32 accumulation from NVIDIA's data sheets (half of those with sparsity), by the name
# that torch.cuda.get_device_name gives. Whole names only: a part of a card (MIG) has the card's name and more.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 836.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 3090": 71.0,
}


def linear_multiply_adds(model: nn.Module) -> int:
    """Multiply-adds of all linear layers of `model`, which may be one itself, for one row of x. Raises ValueError for a
    kind of layer that does not define them."""
    own = getattr(model, "multiply_adds", None)  # a ReplacedLinear's, or another layer's that can count
    if own is not None:
        return int(own())
    weight = model.weight.numel() if isinstance(model, nn.Linear | TiedHead) else 0
    return weight + sum(map(linear_multiply_adds, model.children()))


def attention_multiply_adds(num_layers: int, hidden_size: int, seq_len: int) -> int:
    """Multiply-adds of a token in causal attention, on average over a full row: scores and sums over the values, each
    position with those up to itself."""
    return num_layers * hidden_size * (seq_len + 1)


def flops_per_token(model: LlamaForCausalLM, seq_len: int) -> int:
    """FLOPs of forward and backward for one token of a full row. Works on the meta device. Raises ValueError as
    `linear_multiply_adds`."""
    shape = model.config
    attention = attention_multiply_adds(shape.num_hidden_layers, shape.hidden_size, seq_len)
    return 6 * (linear_multiply_adds(model) + attention)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of a device for products of this dtype; None where it is not known. Only bfloat16 has a table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device))


@dataclass
class Utilisation:
    """Turns the speed of a run into arithmetic.

    Args:
        model: the bare model; counted at each call, because phases of a method change its layers.
        peak: TFLOPS of one device; None: unknown.
    """

    model: LlamaForCausalLM
    seq_len: int
    num_devices: int
    peak: float | None

    def numbers(self, tokens_per_second: float) -> dict[str, float]:
        """The "tflops" of one device at this speed of all devices together, and "mfu" where the peak is known; neither
        for a model with a layer that cannot count its work."""
        try:
            flops = flops_per_token(self.model, self.seq_len)
        except ValueError:
            return {}
        tflops = tokens_per_second * flops / self.num_devices / 1e12
        return {"tflops": tflops} if self.peak is None else {"tflops": tflops, "mfu": tflops / self.peak}
