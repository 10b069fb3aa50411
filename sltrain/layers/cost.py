"""The cheaper path to compute x W^T, from the layer's shape and the device alone.

The unit of cost is one multiply-add of a large dense product on the same device; the prices below are in this unit.
With N rows, in x out entries, rank r and nnz trained entries, forward and backward cost

    composed   3 N in out + 4 r in out  +  passes over a dense W or dW: building two and taking one apart
    factored   3 N r (in + out)         +  3 N nnz * price of an entry of S, or 3 N in out where S has to be made dense

Nothing is timed when a model is built: a choice by the clock could differ between two starts, and a resumed run would
not be exact. `sltrain-bench what=layer calibrate=true` measures the prices of a machine.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sltrain.layers.base import ReplacedLinear
from sltrain.layers.sparse import has_kernel

PASSES = 8  # over a dense matrix in forward and backward: W written, read and changed twice, dW written and read


@dataclass(frozen=True)
class Costs:
    """Prices on one kind of device."""

    entry: float | None  # of a uniform or stratified S, for one row of x; None: S is made dense instead
    block_entry: float
    column_entry: float
    weight_pass: float  # to read or write one entry of W


# CPU: medians over the paper's shapes on two AVX-512 cores; up to twice as much on small or narrow matrices, where
# reading x and writing y weighs more. Blocks without the kernel are an estimate; `rolled` has the price of columns,
# unmeasured.
COSTS = {
    "cpu": Costs(entry=2.3, block_entry=2.2, column_entry=4.2, weight_pass=29.0),
    "cpu without kernel": Costs(entry=None, block_entry=5.0, column_entry=4.2, weight_pass=29.0),
    "cuda": Costs(entry=None, block_entry=4.0, column_entry=2.0, weight_pass=200.0),  # from bandwidth, not measured
}


def machine_kind(device: torch.device, dtype: torch.dtype) -> str:
    """The key of COSTS for tensors of this device and dtype."""
    if device.type != "cpu":
        return "cuda"
    return "cpu" if has_kernel(device, dtype) else "cpu without kernel"


def composed_cost(num_rows: int, out_features: int, in_features: int, rank: int, costs: Costs) -> float:
    """The cost of forward and backward through a dense W."""
    return (3 * num_rows + 4 * rank + PASSES * costs.weight_pass) * out_features * in_features


def factored_cost(
    num_rows: int, out_features: int, in_features: int, rank: int, num_nonzero: int, price: str, costs: Costs
) -> float:
    """The cost of forward and backward through A, B and S. `price` is that of the support, a field of Costs."""
    dense = (num_rows + costs.weight_pass) * out_features * in_features
    of_entry: float | None = getattr(costs, price)
    sparse = dense if of_entry is None else num_rows * num_nonzero * of_entry
    return 3 * (num_rows * rank * (in_features + out_features) + (sparse if num_nonzero else 0))


def choose_path(
    num_rows: int, out_features: int, in_features: int, rank: int, num_nonzero: int, price: str, machine: str
) -> str:
    """composed or factored, for `num_rows` rows of x at a time; `machine` is a key of COSTS."""
    costs = COSTS[machine]
    composed = composed_cost(num_rows, out_features, in_features, rank, costs)
    factored = factored_cost(num_rows, out_features, in_features, rank, num_nonzero, price, costs)
    return "factored" if factored < composed else "composed"


def set_paths(
    model: nn.Module, layer_path: str, num_rows: int, device: torch.device, saved: dict[str, str] | None = None
) -> dict[str, str]:
    """Fix the path of every layer that has several, and return the paths by name. It is `layer_path` if the layer knows
    it, else the `saved` one of a resumed run, else the layer's choice for `num_rows` rows at a time on `device`."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ReplacedLinear) and m.PATHS}
    arithmetic = getattr(model, "arithmetic", lambda device_type: nullcontext())  # mixed precision: models/llama.py
    with arithmetic(device.type):
        for name, layer in layers.items():
            typed = layer_path if layer_path in layer.PATHS else None
            layer.path = typed or (saved or {}).get(name) or layer.choose_path(num_rows, device)
    return {name: layer.path for name, layer in layers.items()}
