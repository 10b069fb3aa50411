"""Which way to compute W x is cheaper, from the layer's shape and the device alone.

Everything is counted in multiply-adds of a large dense product on the same device, so the prices below say how many of
those one operation costs there. With N rows, in x out entries, rank r and nnz trained entries, forward and backward are

    composed   3 N in out + 4 r in out  +  passes over a dense W or dW: building two and taking one apart
    factored   3 N r (in + out)         +  3 N nnz * price of an entry of S, or 3 N in out where S has to be made dense

Nothing is timed when a model is built: a choice that depended on the clock could differ from one start to the next, and
a resumed run would not be exact. `sltrain-bench what=layer calibrate=true` measures the prices of a machine.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sltrain.layers.base import ReplacedLinear
from sltrain.layers.sparse import has_kernel

PASSES = 8  # over a dense W in forward and backward: written, read and changed twice, dW written and read


@dataclass(frozen=True)
class Costs:
    """Prices on one kind of device, in multiply-adds of a large dense product."""

    entry: float | None  # one entry of a uniform or stratified S, one row of x; None: S is made dense instead
    block_entry: float
    column_entry: float
    weight_pass: float  # one entry of W, read or written


# Of the CPU: medians over the paper's shapes on two AVX-512 cores; up to twice as much on small or narrow matrices,
# where reading x and writing y weighs more. Blocks without the kernel are an estimate.
COSTS = {
    "cpu": Costs(entry=2.3, block_entry=2.2, column_entry=4.2, weight_pass=29.0),
    "cpu without kernel": Costs(entry=None, block_entry=5.0, column_entry=4.2, weight_pass=29.0),
    "cuda": Costs(entry=None, block_entry=4.0, column_entry=2.0, weight_pass=200.0),  # by bandwidth, not measured
}


def machine_kind(device: torch.device, dtype: torch.dtype) -> str:
    """The key of COSTS for tensors of this device and dtype."""
    if device.type != "cpu":
        return "cuda"
    return "cpu" if has_kernel(device, dtype) else "cpu without kernel"


def composed_cost(num_rows: int, out_features: int, in_features: int, rank: int, costs: Costs) -> float:
    """Forward and backward through a dense W, in multiply-adds."""
    return (3 * num_rows + 4 * rank + PASSES * costs.weight_pass) * out_features * in_features


def factored_cost(
    num_rows: int, out_features: int, in_features: int, rank: int, num_nonzero: int, price: str, costs: Costs
) -> float:
    """Forward and backward through A, B and S, in multiply-adds. `price` is that of the support: a field of Costs."""
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
    """Fix the path of every layer that has several, and return them by name: `layer_path` where the layer knows it, or
    else the one a run was `saved` with, or the layer's own choice for `num_rows` rows of x at a time on `device`."""
    paths = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ReplacedLinear) and layer.PATHS:
            if layer_path in layer.PATHS:
                layer.path = layer_path
            else:
                layer.path = (saved or {}).get(name) or layer.choose_path(num_rows, device)
            paths[name] = layer.path
    return paths
