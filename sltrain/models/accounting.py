"""How many values a model trains, by group.

    low_rank   A and B of replaced projections       sparse   the trained values of S
    dense      everything else: embeddings, head, norms, projections that were not replaced

The paper's parameter counts are `total`. The positions of S are no parameters, but they take memory: they are counted
apart.
"""

from torch import nn

from sltrain.layers.linear import FactoredLinear, SLTrainLinear


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "dense", "low_rank", "sparse"}: numbers of values; shared parameters count once. Works on the meta
    device."""
    group_of: dict[nn.Parameter, str] = {}
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            group_of |= {module.A: "low_rank", module.B: "low_rank"}
        if isinstance(module, SLTrainLinear):
            group_of[module.values] = "sparse"
    counts = {"total": 0, "dense": 0, "low_rank": 0, "sparse": 0}
    for parameter in model.parameters():
        counts[group_of.get(parameter, "dense")] += parameter.numel()
        counts["total"] += parameter.numel()

    layers = {module for module in model.modules() if isinstance(module, FactoredLinear)}
    assert counts["total"] == counts["dense"] + counts["low_rank"] + counts["sparse"]
    assert counts["low_rank"] == sum(layer.num_low_rank for layer in layers)
    assert counts["sparse"] == sum(layer.num_sparse for layer in layers)
    return counts


def count_indices(model: nn.Module) -> int:
    """Number of stored positions of S: of entries, blocks or columns."""
    return sum(module.indices.numel() for module in model.modules() if isinstance(module, SLTrainLinear))
