"""Named parameters and plain settings -> an ordinary torch optimizer.

Parameters fall into two groups. Weights decay: projections dense or factored, embeddings, head, and the values of S,
which are entries of a weight matrix although their tensor is 1-D (hence the split by name, not by shape). Norm gains
and biases do not: pulling them to zero is no regularization. The paper's recipes have weight_decay 0, where AdamW is
Adam.

adamw     torch.optim.AdamW, its two moments in the parameters' dtype: bfloat16 parameters have bfloat16 moments, the
          paper's setting. The fused kernel is 6 times faster on a CPU too (3.3 ms against 19 ms for 5.6M parameters on
          one thread), gives the same bits at any number of threads, and rounds a bfloat16 update once instead of at
          every operation. On a CPU it ignores a gradient's strides (measured on torch 2.13). Those that autograd
          accumulates have their parameter's; never assign `.grad` a transposed tensor by hand.
adam8bit  bitsandbytes AdamW8bit: both moments as 8-bit codes, one scale a block of 256 (Dettmers et al., arXiv
          2110.02861); float32 moments for parameters of fewer than 4096 elements.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

OPTIMIZERS = ("adamw", "adam8bit")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer `name` over `model.named_parameters()`, which live on `device`.

    Frozen parameters are left out, and a parameter that comes twice (tied weights) is updated once.

    Raises ValueError for an unknown name, for adam8bit without bitsandbytes, and when nothing is trainable.
    """
    check_optimizer(name)
    groups = parameter_groups(named_parameters, weight_decay)
    settings: dict[str, Any] = {"lr": lr, "betas": (float(betas[0]), float(betas[1])), "eps": eps}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **settings)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


def check_optimizer(name: str) -> None:
    """Raise ValueError for an unknown optimizer, and for adam8bit without bitsandbytes."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}.")
    if name == "adam8bit":
        try:
            import bitsandbytes  # noqa: F401  (seconds to import)
        except ImportError as error:
            raise ValueError(
                f"optimizer=adam8bit needs bitsandbytes, which cannot be imported ({error}): "
                "run `pip install bitsandbytes`, or take optimizer=adamw."
            ) from error


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, each exactly once, as [decaying, not decaying]; an empty group is left out."""
    trainable: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            trainable.setdefault(parameter, name)  # a tied parameter goes by its first name
    if not trainable:
        raise ValueError("the model has no trainable parameter: nothing to optimize.")
    decay = [parameter for parameter, name in trainable.items() if not is_gain_or_bias(name)]
    no_decay = [parameter for parameter, name in trainable.items() if is_gain_or_bias(name)]
    ids = [id(parameter) for parameter in decay + no_decay]
    assert sorted(ids) == sorted(map(id, trainable)), "each trainable parameter belongs to exactly one group"
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_gain_or_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias, or the weight of a module whose name contains "norm"."""
    *parents, leaf = name.split(".")
    return leaf == "bias" or (leaf == "weight" and bool(parents) and "norm" in parents[-1].lower())


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Make `lr` the learning rate of every group from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
