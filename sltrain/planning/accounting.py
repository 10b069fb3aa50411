"""Numbers of trained values and stored bytes of a model, by group.

    low_rank   A and B of replaced projections       sparse   the trained values of S
    frozen     parameters that are not trained       dense    all others: embeddings, head, norms, projections that were
                                                              not replaced

A layer can define other groups (`GROUPS` in layers/base.py). The paper's parameter counts are `total`. The positions of
S and other buffers are no parameters, but take memory: they are counted in bytes only.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from sltrain.layers.base import ReplacedLinear, check_known
from sltrain.models.llama import PROJECTIONS
from sltrain.numeric import is_stand_in
from sltrain.planning.sharding import local_shape

ALWAYS = ("dense", "low_rank", "sparse")  # groups that every count has, even if 0
STORED = {"sparse": "sparse_values", "indices": "indices"}  # group -> its name in `stored_bytes`; others: GROUP_weights


def tensor_groups(model: nn.Module) -> dict[Tensor, str]:
    """The group of each parameter and buffer, shared ones once. Raises ValueError for a module of unknown kind in a
    projection's place."""
    groups: dict[Tensor, str] = dict.fromkeys([*model.parameters(), *model.buffers()], "dense")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            check_known(name, module)
        if isinstance(module, ReplacedLinear):
            own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            groups |= {own[tensor]: group for tensor, group in module.GROUPS.items() if own.get(tensor) is not None}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            groups[parameter] = "frozen"
        elif groups[parameter] == "frozen":
            groups[parameter] = "dense"
    return groups


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of values by group: "dense", "low_rank", "sparse", others of the layers, their "total", and, if there are
    any, "frozen" ones, which are not in the total. Works on the meta device. Raises ValueError as `tensor_groups`."""
    groups = tensor_groups(model)
    counts = dict.fromkeys(["total", *ALWAYS], 0)
    for parameter in dict.fromkeys(model.parameters()):
        group = groups[parameter]
        counts[group] = counts.get(group, 0) + parameter.numel()
        counts["total"] += parameter.numel() if parameter.requires_grad else 0
    assert counts["total"] == sum(trained_groups(counts).values())
    return counts


def trained_groups(counts: dict[str, int]) -> dict[str, int]:
    """The groups of `count_parameters` that add up to the total."""
    return {group: number for group, number in counts.items() if group not in ("total", "frozen")}


def sum_of_groups(counts: dict[str, int], show: Callable[[int], str]) -> str:
    """Counts as "A dense + B low-rank + C sparse, and D frozen", with numbers formatted by `show`; without those that
    are 0."""
    groups = {group.replace("_", "-"): number for group, number in trained_groups(counts).items() if number}
    terms = [f"{show(number)} {group}" for group, number in groups.items()]
    frozen = f", and {show(counts['frozen'])} frozen" if "frozen" in counts else ""
    return " + ".join(terms) + frozen


def stored_bytes(model: nn.Module, num_shards: int = 1) -> dict[str, int]:
    """Bytes of parameters and buffers in memory and in a checkpoint: "dense_weights", "low_rank_weights",
    "sparse_values", "indices", and others. With shards (sharding.py), those that one rank holds of the parameters, and
    all buffers. Works on the meta device. Raises ValueError as `tensor_groups`."""
    stored = {"dense_weights": 0, "low_rank_weights": 0, "sparse_values": 0, "indices": 0}
    for tensor, group in tensor_groups(model).items():
        name = STORED.get(group, f"{group}_weights")
        shape = local_shape(tensor.shape, num_shards) if isinstance(tensor, nn.Parameter) else tensor.shape
        numel = 1 if is_stand_in(tensor) else math.prod(shape)
        stored[name] = stored.get(name, 0) + numel * tensor.element_size()
    return stored
