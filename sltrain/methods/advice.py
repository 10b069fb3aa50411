"""Where a method cannot pay: lines for the person who starts a run."""

from torch import nn

from sltrain.layers.linear import FactoredLinear, SLTrainLinear


def warnings(model: nn.Module) -> list[str]:
    """At most two lines: layers that train no fewer values than a dense matrix, and positions of S that outweigh half
    its values."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    lines = []

    heavy = [name for name, layer in layers.items() if _num_trained(layer) >= layer.in_features * layer.out_features]
    if heavy:
        first = layers[heavy[0]]
        lines.append(
            f"{len(heavy)} of {len(layers)} layers train no fewer values than a dense matrix (the first, {heavy[0]}: "
            f"{_num_trained(first):,} for {first.out_features} x {first.in_features}): lower rank or sparsity there"
        )

    sparse = [layer for layer in layers.values() if isinstance(layer, SLTrainLinear)]
    index_bytes = sum(layer.indices.numel() * layer.indices.element_size() for layer in sparse)
    value_bytes = sum(layer.values.numel() * layer.values.element_size() for layer in sparse)
    if 2 * index_bytes > value_bytes:
        lines.append(
            f"the positions of S take {index_bytes / 1e6:,.1f} MB beside {value_bytes / 1e6:,.1f} MB of its values: "
            "count them when you compare memory"
        )
    return lines


def _num_trained(layer: FactoredLinear) -> int:
    return layer.num_low_rank + layer.num_sparse
