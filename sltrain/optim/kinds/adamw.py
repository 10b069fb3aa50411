"""optimizer=adamw: torch.optim.AdamW (Loshchilov & Hutter, arXiv 1711.05101). With weight_decay=0, as in the paper, it
is Adam.

The two moments have the parameters' dtype: bfloat16 parameters have bfloat16 moments, the paper's setting, and
moments_dtype=float32 gives them float32 ones (optim/adamw.py, which also says what bfloat16 moments lose). The fused
kernel is 6 times faster on a CPU too (3.3 ms against 19 ms for 5.6M parameters on one thread), gives the same bits at
any number of threads, and rounds a bfloat16 update once instead of at every operation. On a CPU it ignores a gradient's
strides (measured on torch 2.13): autograd's gradients have their parameter's, but never assign `.grad` a transposed
tensor by hand. It cannot round stochastically; optim/adamw.py does.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.parameters import PIECE, ParamInfo

if TYPE_CHECKING:
    import torch

WORKING_COPIES = 6  # float32 copies of a piece that optim/adamw.py makes


@dataclass
class AdamOptions(OptimizerConfig):
    """The options that all variants of Adam share."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    eps: float = 1e-8

    locality: ClassVar[str] = "element"

    def check(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optimizer.betas={self.betas}: must be two numbers from 0 to below 1, such as [0.9,0.999]"
            )
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"optimizer.eps={self.eps}: must be a number above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of torch's optimizers."""
        return {"betas": (float(self.betas[0]), float(self.betas[1])), "eps": self.eps}


@OPTIMIZERS.register("adamw")
@dataclass
class AdamWOptions(AdamOptions):
    """Options of optimizer=adamw."""

    moments_dtype: str = "auto"  # auto: as the weights; float32: also those of bfloat16 weights

    rounds: ClassVar[bool] = True
    smaller: ClassVar[str | None] = "adam8bit"

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        import torch

        if self._widens(groups[0]["params"][0]):
            return self.make_rounding(groups, lr, device, seed=None)
        return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"), **self.settings)

    def make_rounding(
        self, groups: list[dict[str, Any]], lr: float, device: "torch.device", seed: int | None
    ) -> "torch.optim.Optimizer":
        import torch

        from sltrain.optim.adamw import AdamW

        moments = torch.float32 if self._widens(groups[0]["params"][0]) else None
        return AdamW(groups, lr=lr, seed=seed, moments_dtype=moments, **self.settings)

    def state_bytes(self, parameter: ParamInfo) -> int:
        element = 4 if self._keeps_float32(parameter.element_size) else parameter.element_size
        return 2 * parameter.numel * element + 4  # two moments and a step count

    def step_bytes(self, parameter: ParamInfo, device_type: str, rounding: bool) -> int:
        """0 for the fused kernel; optim/adamw.py works on float32 copies of a piece of a narrower tensor."""
        wide = self._keeps_float32(parameter.element_size)
        if parameter.element_size >= 4 or not (rounding or wide):
            return 0
        copies = WORKING_COPIES - 2 * wide if rounding else 2
        return 4 * min(parameter.numel, PIECE) * copies

    def warnings(self, weight: "torch.Tensor") -> list[str]:
        beta2 = self.betas[1]
        if weight.element_size() >= 4 or self.moments_dtype == "float32" or beta2 < 0.99:
            return []
        return [
            f"bfloat16 second moments at beta2={beta2:g} lose most of their small changes (at 0.999 they settle at 1.44"
            " of the true ones): the paper's recipe; moments_dtype=float32 or precision=mixed keeps them"
        ]

    def _keeps_float32(self, element_size: int) -> bool:
        """Whether the moments are wider than weights of `element_size` bytes."""
        return self.moments_dtype == "float32" and element_size < 4

    def _widens(self, weight: "torch.Tensor") -> bool:
        return self._keeps_float32(weight.element_size())
