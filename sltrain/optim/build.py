"""Named parameters and plain settings -> an ordinary torch optimizer.

Parameters fall into two groups. Weights decay: projections dense or factored, embeddings, head, and the values of S,
which are entries of a weight matrix although their tensor is 1-D (hence the split by name, not by shape). Norm gains
and biases do not: pulling them to zero is no regularization. The paper's recipes have weight_decay 0, where AdamW is
Adam.

adamw     torch.optim.AdamW, its two moments in the parameters' dtype: bfloat16 parameters have bfloat16 moments, the
          paper's setting. The fused kernel is 6 times faster on a CPU too (3.3 ms against 19 ms for 5.6M parameters on
          one thread), gives the same bits at any number of threads, and rounds a bfloat16 update once instead of at
          every operation. On a CPU it ignores a gradient's strides (measured on torch 2.13). Those that autograd
          accumulates have their parameter's; never assign `.grad` a transposed tensor by hand. It cannot round
          stochastically; adamw.py does.
adam8bit  bitsandbytes AdamW8bit: both moments as 8-bit codes, one scale a block of 256 (Dettmers et al., arXiv
          2110.02861); float32 moments for parameters of fewer than 4096 elements.
adam4bit  torchao AdamW4bit: 4-bit codes, one scale a block of 128 (Li et al., arXiv 2309.01507); moments in the
          parameter's dtype for fewer than 4096 elements. It is given parameters in pieces (in_pieces.py). It compiles
          its step for each size of piece in the first update, some seconds each, and needs a C++ compiler for that on
          a CPU, Triton on a GPU.

Another optimizer with a small state is one more line in OPTIMIZERS (what makes it, how many bytes its state has, and
what must be installed), its name among the CHOICES of config.py, and a file in conf/optimizer/. All that is asked of it
is torch's protocol: state by parameter in `state`, tensors and plain numbers, among them a "step" that counts a
parameter's updates; settings in `param_groups`, read anew in every step. Then per-layer update, stochastic rounding,
checkpoints and the memory plan work with it. To be let in it has to go on bit for bit from a checkpoint and to have
exactly the bytes it says: tests/engine/test_checkpoint.py and tests/optim/test_build.py ask that of every line of the
table.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.numeric import PIECE
from sltrain.optim.adamw import AdamW
from sltrain.optim.in_pieces import InPieces, piece_sizes
from sltrain.optim.rounding import StochasticRounding

Groups = list[dict[str, Any]]
WORKING_COPIES = 6  # float32 copies of a piece that adamw.py makes of narrower dtypes


@dataclass(frozen=True)
class OptimizerKind:
    """One choice of `optimizer`."""

    make: Callable[[Groups, dict[str, Any], torch.device], Optimizer]  # groups, lr betas eps, where parameters live
    state_bytes: Callable[[int, int], int]  # state of a parameter of so many elements, of so many bytes each
    shared_bytes: int = 0  # state that all parameters share
    copies_on_cpu: int = 0  # float32 copies of a parameter that its step makes while it works; one more if narrower
    copies_on_cuda: int = 0
    in_pieces: bool = False  # whether it is given parameters in pieces, so that these copies are small
    package: str | None = None  # what `make` imports
    install: str = ""  # the command that brings it


def _make_adamw(groups: Groups, settings: dict[str, Any], device: torch.device) -> Optimizer:
    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **settings)


def _adamw_bytes(numel: int, element_size: int) -> int:
    return 2 * numel * element_size + 4  # two moments and a step count


def _make_adam8bit(groups: Groups, settings: dict[str, Any], device: torch.device) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


def _adam8bit_bytes(numel: int, element_size: int) -> int:
    return 8 * numel if numel < 4096 else 2 * (numel + 4 * -(-numel // 256))  # the step count is a Python number


def _make_adam4bit(groups: Groups, settings: dict[str, Any], device: torch.device) -> Optimizer:
    from torchao.optim import AdamW4bit

    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # it is only compiled anew
    return AdamW4bit(groups, **settings)


def _adam4bit_bytes(numel: int, element_size: int) -> int:
    """Under stochastic rounding the optimizer sees elements of 4 bytes."""
    if numel < 4096 or numel % 128:
        return _adamw_bytes(numel, element_size)
    return 2 * (numel // 2 + 4 * (numel // 128) + 4 * 16) + 4  # codes, scales and the values of the 16 codes


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_make_adamw, _adamw_bytes),
    "adam8bit": OptimizerKind(
        _make_adam8bit,
        _adam8bit_bytes,
        shared_bytes=2 * 4 * 256,  # the values of the 256 codes of either moment
        copies_on_cpu=5,
        package="bitsandbytes",
        install="pip install bitsandbytes",
    ),
    "adam4bit": OptimizerKind(
        _make_adam4bit,
        _adam4bit_bytes,
        copies_on_cpu=6,
        copies_on_cuda=7,  # not measured there; the compiler may fuse some away
        in_pieces=True,
        package="torchao",
        install="pip install 'sltrain[adam4bit]'",
    ),
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    device: torch.device,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> Optimizer:
    """The optimizer `name` over `model.named_parameters()`, which live on `device`.

    Frozen parameters are left out, and a parameter that comes twice (tied weights) is updated once. `seed` is that of
    stochastic rounding.

    Raises ValueError for an unknown name, for a package that is missing, and when nothing is trainable.
    """
    check_optimizer(name)
    groups = parameter_groups(named_parameters, weight_decay)
    settings: dict[str, Any] = {"lr": lr, "betas": (float(betas[0]), float(betas[1])), "eps": eps}
    if name == "adamw" and stochastic_rounding:
        return AdamW(groups, **settings, seed=seed)

    def make(groups: Groups) -> Optimizer:
        optimizer = OPTIMIZERS[name].make(groups, settings, device)
        return StochasticRounding(optimizer, seed) if stochastic_rounding else optimizer

    return InPieces(groups, make) if works_in_pieces(name, stochastic_rounding) else make(groups)


def works_in_pieces(name: str, stochastic_rounding: bool) -> bool:
    """Whether the optimizer is given its parameters in pieces, because it would take several float32 copies of them."""
    return OPTIMIZERS[name].in_pieces or (name != "adamw" and stochastic_rounding)


def state_bytes(name: str, numel: int, element_size: int, stochastic_rounding: bool = False) -> int:
    """Bytes of state of one parameter."""
    kind = OPTIMIZERS[name]
    sizes = piece_sizes(numel) if works_in_pieces(name, stochastic_rounding) else [numel]
    seen_size = 4 if stochastic_rounding and name != "adamw" else element_size  # in float32, to be rounded afterwards
    return sum(kind.state_bytes(size, seen_size) for size in sizes)


def step_bytes(name: str, sizes: Sequence[tuple[int, int]], device_type: str, *, stochastic_rounding: bool) -> int:
    """Bytes that a step of `build_optimizer`'s result takes while it works, for parameters of these (numel,
    element_size)."""
    largest = max(numel for numel, _ in sizes)
    rounds = any(element_size < 4 for _, element_size in sizes)
    if name == "adamw":
        copies = WORKING_COPIES if stochastic_rounding and rounds else 0
        return 4 * min(largest, PIECE) * copies
    kind = OPTIMIZERS[name]
    copies = kind.copies_on_cuda if device_type == "cuda" else kind.copies_on_cpu + rounds
    at_once = min(largest, PIECE) if works_in_pieces(name, stochastic_rounding) else largest
    return 4 * at_once * (copies + 2 * stochastic_rounding)  # weight and gradient in float32


def check_optimizer(name: str) -> None:
    """Raise ValueError for an unknown optimizer, and for one whose package cannot be imported."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}.")
    kind = OPTIMIZERS[name]
    if kind.package is not None:
        try:
            logging.disable(logging.WARNING)  # about kernels that no optimizer here uses
            importlib.import_module(kind.package)  # seconds
        except ImportError as error:
            raise ValueError(
                f"optimizer={name} needs {kind.package}, which cannot be imported ({error}): "
                f"run `{kind.install}`, or take optimizer=adamw."
            ) from error
        finally:
            logging.disable(logging.NOTSET)


def check_updates(
    *,
    dtype: torch.dtype,
    per_layer_update: bool = False,
    grad_clip: float | None = None,
    stochastic_rounding: bool = False,
) -> None:
    """Raise ValueError for ways of updating that do not go together; `dtype` is that of the weights."""
    if per_layer_update and grad_clip is not None:
        raise ValueError(
            f"grad_clip={grad_clip} needs all gradients at once, which per_layer_update=true frees one by one; "
            f"set grad_clip=null, or grad_clip_per_parameter={grad_clip} in its place."
        )
    if stochastic_rounding and dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic_rounding=true is for bfloat16 weights, and they are {str(dtype).removeprefix('torch.')}; "
            "set dtype=bfloat16, or stochastic_rounding=false."
        )


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    """The trainable parameters, each exactly once, as [decaying, not decaying], with their names in "param_names", as
    torch's optimizers keep them; an empty group is left out."""
    trainable: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            trainable.setdefault(parameter, name)  # a tied parameter goes by its first name
    if not trainable:
        raise ValueError("the model has no trainable parameter: nothing to optimize.")
    groups = []
    for decays in (True, False):
        chosen = [(name, parameter) for parameter, name in trainable.items() if is_gain_or_bias(name) != decays]
        if chosen:
            names, parameters = map(list, zip(*chosen, strict=True))
            decay = weight_decay if decays else 0.0
            groups.append({"params": parameters, "param_names": names, "weight_decay": decay})
    return groups


def is_gain_or_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias, or the weight of a module whose name contains "norm"."""
    *parents, leaf = name.split(".")
    return leaf == "bias" or (leaf == "weight" and bool(parents) and "norm" in parents[-1].lower())


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Make `lr` the learning rate of every group from the next update on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # torchao's: its compiled step reads a tensor
        else:
            group["lr"] = lr
