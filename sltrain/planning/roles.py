"""The role of each trained parameter of a model."""

from torch import nn

from sltrain.numeric import is_stand_in
from sltrain.parameters import ParamInfo, role_by_name

# Of a layer's GROUPS.
ROLE_OF_GROUP = {"low_rank": "factor", "sparse": "values", "singular": "values", "magnitude": "values", "scale": "gain"}


def parameters_of(model: nn.Module) -> dict[str, ParamInfo]:
    """The trained parameters by name, in the model's order; a tied one has its first name. Works on the meta device."""
    found: dict[nn.Parameter, ParamInfo] = {}
    for module_name, module in model.named_modules():
        groups = getattr(module, "GROUPS", {})
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in found:
                name = f"{module_name}.{leaf}" if module_name else leaf
                role = ROLE_OF_GROUP.get(groups.get(leaf, "")) or _role(name, module_name, module)
                found[parameter] = ParamInfo(
                    name, tuple(parameter.shape), parameter.element_size(), role, is_stand_in(parameter)
                )
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    return {info.name: info for info in sorted(found.values(), key=lambda info: order[info.name])}


def _role(name: str, module_name: str, module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "head" if module_name.rpartition(".")[2] == "lm_head" else role_by_name(name)
