"""optimizer=adafactor: torch.optim.Adafactor (Shazeer & Stern, arXiv 1804.04235): the second moment of a matrix from
its row and column means, no first moment.

Its step is relative: lr times the root mean square of the tensor (at least 0.001), and at most 1 / sqrt(step) of that.
So lr is near 0.01 to 0.1, not Adam's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register("adafactor")
@dataclass
class Adafactor(OptimizerConfig):
    """Options of optimizer=adafactor."""

    beta2_decay: float = -0.8  # the second moment's decay at step t is 1 - t^beta2_decay
    clip: float = 1.0  # largest root mean square of a tensor's update over lr

    whole_moments: ClassVar[bool] = False
    copies_on_cpu: ClassVar[int] = 2
    copies_on_cuda: ClassVar[int] = 2

    def check(self) -> None:
        if not -1 <= self.beta2_decay < 0:
            raise ValueError(f"optimizer.beta2_decay={self.beta2_decay}: must be from -1 to below 0 (-0.8 is usual)")
        if not 1 <= self.clip < float("inf"):
            raise ValueError(f"optimizer.clip={self.clip}: must be a number of at least 1")

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        import torch

        return torch.optim.Adafactor(groups, lr=lr, beta2_decay=self.beta2_decay, d=self.clip, foreach=False)

    def state_bytes(self, parameter: ParamInfo) -> int:
        kept = sum(parameter.shape) if len(parameter.shape) == 2 else parameter.numel
        return kept * parameter.element_size + 4  # and a step count
