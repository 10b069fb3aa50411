"""How many values a model trains and how many bytes it stores, by group.

    low_rank   A and B of replaced projections       sparse   the trained values of S
    dense      everything else: embeddings, head, norms, projections that were not replaced

The paper's parameter counts are `total`. The positions of S are no parameters, but they take memory: they are counted
apart.
"""

from torch import nn

from sltrain.layers.linear import FactoredLinear, SLTrainLinear


def parameter_groups(model: nn.Module) -> dict[nn.Parameter, str]:
    """The group of each parameter, dense, low_rank or sparse; shared parameters come once."""
    groups: dict[nn.Parameter, str] = dict.fromkeys(model.parameters(), "dense")
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            groups |= {module.A: "low_rank", module.B: "low_rank"}
        if isinstance(module, SLTrainLinear):
            groups[module.values] = "sparse"
    return groups


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "dense", "low_rank", "sparse"}: numbers of values. Works on the meta device."""
    counts = {"total": 0, "dense": 0, "low_rank": 0, "sparse": 0}
    for parameter, group in parameter_groups(model).items():
        counts[group] += parameter.numel()
        counts["total"] += parameter.numel()

    layers = {module for module in model.modules() if isinstance(module, FactoredLinear)}
    assert counts["total"] == counts["dense"] + counts["low_rank"] + counts["sparse"]
    assert counts["low_rank"] == sum(layer.num_low_rank for layer in layers)
    assert counts["sparse"] == sum(layer.num_sparse for layer in layers)
    return counts


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """{"dense_weights", "low_rank_weights", "sparse_values", "indices"}: bytes of parameters and of the positions of S,
    as they lie in memory and in a checkpoint. Works on the meta device."""
    names = {"dense": "dense_weights", "low_rank": "low_rank_weights", "sparse": "sparse_values"}
    stored = dict.fromkeys([*names.values(), "indices"], 0)
    for parameter, group in parameter_groups(model).items():
        stored[names[group]] += parameter.numel() * parameter.element_size()
    for module in {module for module in model.modules() if isinstance(module, SLTrainLinear)}:
        stored["indices"] += module.indices.numel() * module.indices.element_size()
    tensors = {*model.parameters(), *model.buffers()}
    assert sum(stored.values()) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return stored
