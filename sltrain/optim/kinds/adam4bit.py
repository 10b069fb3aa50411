"""optimizer=adam4bit: torchao AdamW4bit (pip install 'sltrain[adam4bit]'). Both moments are 4-bit codes, one scale a
block of 128 (Li et al., arXiv 2309.01507). A parameter of fewer than 4096 elements, and the remainder of a parameter
that whole blocks do not cover, have moments in the parameter's dtype.

It gets parameters in pieces (in_pieces.py), and compiles its step for each size of piece in the first update: some
seconds each, with a C++ compiler on a CPU, Triton on a GPU.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.adamw import AdamOptions
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register("adam4bit")
@dataclass
class Adam4bit(AdamOptions):
    """Options of optimizer=adam4bit."""

    in_pieces: ClassVar[bool] = True
    copies_on_cpu: ClassVar[int] = 6
    copies_on_cuda: ClassVar[int] = 7  # not measured there; the compiler may fuse some away
    whole_moments: ClassVar[bool] = False
    package: ClassVar[str | None] = "torchao"
    install: ClassVar[str] = "pip install 'sltrain[adam4bit]'"
    compiles: ClassVar[bool] = True

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        from torchao.optim import AdamW4bit

        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # it is only compiled again
        return AdamW4bit(groups, lr=lr, **self.settings)

    def state_bytes(self, parameter: ParamInfo) -> int:
        numel = parameter.numel
        if numel < 4096 or numel % 128:
            return 2 * numel * parameter.element_size + 4
        return 2 * (numel // 2 + 4 * (numel // 128) + 4 * 16) + 4  # codes, scales and the values of the 16 codes

    def notes(self, device_type: str) -> list[str]:
        if device_type != "cuda":
            return []
        return ["adam4bit: the memory of its compiled step was measured on a CPU only"]
