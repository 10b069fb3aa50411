"""How many values a model trains and how many bytes it stores, by group.

    low_rank   A and B of replaced projections       sparse   the trained values of S
    frozen     parameters that are not trained       dense    everything else: embeddings, head, norms, projections that
                                                              were not replaced

A layer may bring other groups (`GROUPS` in layers/base.py). The paper's parameter counts are `total`. The positions of
S and other buffers are no parameters, but they take memory: they are counted apart.
"""

from collections.abc import Callable

from torch import Tensor, nn

from sltrain.layers.base import ReplacedLinear, check_known
from sltrain.models.llama import PROJECTIONS

ALWAYS = ("dense", "low_rank", "sparse")  # groups that are counted even where there are none
STORED = {"sparse": "sparse_values", "indices": "indices"}  # the others: GROUP_weights


def tensor_groups(model: nn.Module) -> dict[Tensor, str]:
    """The group of each parameter and buffer; shared tensors come once. Raises ValueError for a module in a
    projection's place of whose W nothing is known."""
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
    """{"total", "dense", "low_rank", "sparse", and other groups of trained parameters}: numbers of values; also
    "frozen" where there are any, which is not part of the total. Works on the meta device. Raises ValueError as
    `tensor_groups`."""
    groups = tensor_groups(model)
    counts = dict.fromkeys(["total", *ALWAYS], 0)
    for parameter in dict.fromkeys(model.parameters()):
        group = groups[parameter]
        counts[group] = counts.get(group, 0) + parameter.numel()
        counts["total"] += parameter.numel() if parameter.requires_grad else 0
    assert counts["total"] == sum(trained_groups(counts).values())
    return counts


def trained_groups(counts: dict[str, int]) -> dict[str, int]:
    """Of what `count_parameters` returns, the groups that add up to the total."""
    return {group: number for group, number in counts.items() if group not in ("total", "frozen")}


def sum_of_groups(counts: dict[str, int], show: Callable[[int], str]) -> str:
    """What `count_parameters` returns as "A dense + B low-rank + C sparse", and frozen ones after that; `show` writes a
    number."""
    terms = [f"{show(number)} {group.replace('_', '-')}" for group, number in trained_groups(counts).items()]
    frozen = f", and {show(counts['frozen'])} frozen" if "frozen" in counts else ""
    return " + ".join(terms) + frozen


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """{"dense_weights", "low_rank_weights", "sparse_values", "indices", and others}: bytes of parameters and buffers,
    as they lie in memory and in a checkpoint. Works on the meta device. Raises ValueError as `tensor_groups`."""
    stored = dict.fromkeys([stored_name(group) for group in (*ALWAYS, "indices")], 0)
    for tensor, group in tensor_groups(model).items():
        name = stored_name(group)
        stored[name] = stored.get(name, 0) + tensor.numel() * tensor.element_size()
    return stored


def stored_name(group: str) -> str:
    """The name under which a group's bytes are listed."""
    return STORED.get(group, f"{group}_weights")
