"""What a method has to say about a model: where it cannot pay, before a run, and how its parts grow, during one."""

import torch
from torch import nn

from sltrain.layers.linear import FactoredLinear, SLTrainLinear


def warnings(model: nn.Module) -> list[str]:
    """At most two lines: layers that train no fewer values than a dense matrix, and a support that leaves W without
    full rank."""
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
    columns = [layer for layer in sparse if layer.support.kind == "column"]
    if columns:
        first = columns[0]
        lines.append(
            f"support=column: W has rank at most rank + columns (the first layer: {first.rank} + "
            f"{first.support.num_columns} of {min(first.in_features, first.out_features)}), not full rank as with the "
            "other supports"
        )
    return lines


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """Frobenius norms of scale * B A and of S, each over all replaced layers together; nothing for a dense model."""
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    if not layers:
        return {}
    norms = torch.stack([torch.stack([layer.low_rank_norm(), layer.sparse_norm()]) for layer in layers])  # (layers, 2)
    low_rank, sparse = norms.square().sum(0).sqrt().tolist()
    return {"low_rank_norm": low_rank, "sparse_norm": sparse}


def _num_trained(layer: FactoredLinear) -> int:
    return layer.num_low_rank + layer.num_sparse
