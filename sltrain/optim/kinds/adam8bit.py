"""optimizer=adam8bit: bitsandbytes AdamW8bit. Both moments are 8-bit codes, one scale a block of 256 (Dettmers et al.,
arXiv 2110.02861); a parameter of fewer than 4096 elements has float32 moments."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.adamw import AdamOptions
from sltrain.optim.kinds.base import OPTIMIZERS
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register("adam8bit")
@dataclass
class Adam8bit(AdamOptions):
    """Options of optimizer=adam8bit."""

    copies_on_cpu: ClassVar[int] = 5
    shared_bytes: ClassVar[int] = 2 * 4 * 256  # the values of the 256 codes of either moment
    whole_moments: ClassVar[bool] = False
    package: ClassVar[str | None] = "bitsandbytes"
    install: ClassVar[str] = "pip install bitsandbytes"

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=lr, **self.settings)

    def state_bytes(self, parameter: ParamInfo) -> int:
        numel = parameter.numel
        return 8 * numel if numel < 4096 else 2 * (numel + 4 * -(-numel // 256))  # the step count is a Python number
