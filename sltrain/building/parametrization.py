"""parametrization=spectral: start and learning rate of each tensor from the shape of its layer, so that one `lr` serves
every width, rank, sparsity and alpha.

A projection is W = s B A + S, W (out, in), A (r, in), B (out, r), s = alpha / r, S with a share rho of its entries
trained. sigma is model.initializer_range (times method.gain where the method has it), w is parametrization.base_width:
a dense matrix with w inputs starts with sigma and learns at `lr`, as with parametrization=paper.

    tensor             standard deviation of the start        factor of lr
    dense W            sigma sqrt(w / in)                     w / in
    head               sigma w / in                           w / in
    A, beside an S     sqrt(r) / in                           w / (2 in)
    B, beside an S     0                                      w / (2 r s) = w / (2 alpha)
    A, without an S    sigma sqrt(w / in)                     w / (2 in)
    B, without an S    1 / (s sqrt(r))                        w / (2 alpha)
    V, beside B A      sigma sqrt(w / (rho in))               w / in
    V alone            sigma sqrt(w / (rho in))               w / (rho in)
    others             as with paper                          1

Dense, head: muP for Adam (Yang et al., arXiv 2203.03466, table 8). A and B: structured muP (Qiu et al., arXiv
2406.06248): a factor starts with fan_in^(-1/2) min(1, sqrt(fan_out / fan_in)), whose spectral norm is about
sqrt(fan_out / fan_in), and learns at in / fan_in of W's rate over the number of factors, 2; s, which is before B, is
taken out of both. Without an S the first outputs are those of B A, and A starts as a dense W does, without the
min(...): outputs then have the size of dense ones at every r. V: S acts as a layer of rho in inputs (Dey et al., arXiv
2405.15743). Beside B A it learns as the entries of a dense W do, a step smaller than theirs by rho.

Steps of about lr an entry are assumed, Adam's. lr_scale of a role multiplies the factors.
"""

import math
from dataclasses import dataclass

from torch import nn

from sltrain.config import TrainConfig
from sltrain.layers import LowRankLinear, SLTrainLinear
from sltrain.models.llama import PROJECTIONS


@dataclass(frozen=True)
class Scale:
    """Standard deviation of a tensor's normal start, and factor of its learning rate."""

    std: float
    rate: float


def set_starts(config: TrainConfig, model: nn.Module) -> None:
    """Tell the modules of a model how their tensors start, for `init_weights`."""
    for name, scale in scales(config, model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.starts = {**getattr(module, "starts", {}), leaf: scale.std}  # type: ignore[assignment]


def scales(config: TrainConfig, model: nn.Module) -> dict[str, Scale]:
    """The scale of each parameter that has one, by its name; none with parametrization=paper. Works on the meta
    device."""
    if config.parametrization.name == "paper":
        return {}
    width, sigma = config.parametrization.base_width, config.model.initializer_range
    assert width is not None, "config_checks.py"
    found: dict[str, Scale] = {}
    for name, module in model.named_modules():
        if name == "lm_head":
            own = {"weight": Scale(sigma * width / config.model.hidden_size, width / config.model.hidden_size)}
        elif name.rpartition(".")[2] in PROJECTIONS:
            own = layer_scales(module, width, sigma * getattr(config.method, "gain", 1.0))
        else:
            continue
        found |= {f"{name}.{leaf}": scale for leaf, scale in own.items()}
    return found


def layer_scales(layer: nn.Module, width: int, sigma: float) -> dict[str, Scale]:
    """The scale of each tensor of a projection, but of its bias, which starts at zero."""
    if isinstance(layer, nn.Linear):
        return {"weight": Scale(sigma * math.sqrt(width / layer.in_features), width / layer.in_features)}
    assert isinstance(layer, LowRankLinear | SLTrainLinear), "methods/base.py, against_spectral"
    inputs, rank = layer.in_features, layer.rank
    num_values = layer.support.num_nonzero if isinstance(layer, SLTrainLinear) else 0
    found: dict[str, Scale] = {}
    if rank:
        std_A, std_B = math.sqrt(rank) / inputs, 0.0
        if not num_values:
            std_A, std_B = sigma * math.sqrt(width / inputs), 1 / (layer.scale * math.sqrt(rank))
        found["A"] = Scale(std_A, width / (2 * inputs))
        found["B"] = Scale(std_B, width / (2 * layer.alpha))
    if num_values:
        fan_in = num_values / layer.out_features  # rho in
        found["values"] = Scale(sigma * math.sqrt(width / fan_in), width / (inputs if rank else fan_in))
    return found
