"""optimizer=scale: gradients normalized row by row, and a momentum for the head alone (SCALE, Glentis et al., arXiv
2506.16659, algorithm 1).

    projections, A, B   g / rms of each row: of the gradient of one output
    embedding           g / rms of each column: of one feature over the vocabulary
    head                the same as projections, of m <- b m + (1 - b) g
    values of S         g / rms of the tensor; the paper has none
    norms               AdamW

All steps have entries of about 1, so Adam's learning rates fit. The head's momentum is the only state of size.
The paper writes W (in, out) and says column; here it is (out, in).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.optim.kinds.rule import check_share
from sltrain.parameters import PIECE, ParamInfo

if TYPE_CHECKING:
    import torch


@dataclass
class Normalized(OptimizerConfig):
    """Normalized gradients for the parameters of some roles."""

    def settings(self) -> "tuple[tuple[str, ...], int | None, float]":
        """The roles, the dimension of the means, and the momentum."""
        raise TypeError(f"{type(self).__name__} does not define settings")

    def takes(self, parameter: ParamInfo) -> bool:
        roles, dim, _ = self.settings()
        return parameter.role in roles and parameter.numel > 0 and (dim is None or len(parameter.shape) == 2)

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        from sltrain.optim.normalized import NormalizedSGD

        _, dim, momentum = self.settings()
        return NormalizedSGD(groups, lr, dim, momentum)

    def state_bytes(self, parameter: ParamInfo) -> int:
        return parameter.numel * parameter.element_size if self.settings()[2] else 0

    def step_bytes(self, parameter: ParamInfo, device_type: str, rounding: bool) -> int:
        """Of a piece: copies in float32 of both operands and the result, or the squares that are summed across rows."""
        copies = 3 if parameter.element_size < 4 else int(self.settings()[1] != 1)
        return copies * 4 * min(parameter.numel, PIECE)


@OPTIMIZERS.register("scale")
@dataclass
class Scale(Normalized):
    """Options of optimizer=scale."""

    momentum: float = 0.9  # of the head's gradient

    def check(self) -> None:
        check_share(momentum=self.momentum)

    def settings(self) -> "tuple[tuple[str, ...], int | None, float]":
        return ("projection", "factor"), 1, 0.0

    def rest(self) -> OptimizerConfig:
        head = Member("scale head", "head", 1, self.momentum)
        return Member("scale embedding", "embedding", 0, next=Member("scale values", "values", None, next=head))


@dataclass
class Member(Normalized):
    """The parameters of one role; `next` updates all others."""

    role: str = ""
    dim: int | None = None
    momentum: float = 0.0
    next: OptimizerConfig | None = None

    def settings(self) -> "tuple[tuple[str, ...], int | None, float]":
        return (self.role,), self.dim, self.momentum

    def rest(self) -> OptimizerConfig:
        return self.next or super().rest()
