"""optimizer=columns: a gradient with columns of length one, with momentum kept for the head alone (after SCALE)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sltrain.optim.kinds.base import OPTIMIZERS, OptimizerConfig
from sltrain.parameters import ParamInfo

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register("columns")
@dataclass
class Columns(OptimizerConfig):
    """Options of optimizer=columns."""

    momentum: float = 0.9  # of the head's gradient

    def takes(self, parameter: ParamInfo) -> bool:
        return parameter.role in ("projection", "factor", "head")

    def make(self, groups: list[dict[str, Any]], lr: float, device: "torch.device") -> "torch.optim.Optimizer":
        import torch

        momentum = self.momentum

        class ColumnSGD(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                for group in self.param_groups:
                    for name, parameter in zip(group["param_names"], group["params"], strict=False):
                        if parameter.grad is not None:
                            self._update(group, name, parameter)

            def _update(self, group: dict[str, Any], name: str, parameter: torch.Tensor) -> None:
                state, direction = self.state[parameter], parameter.grad
                state["step"] = state.get("step", 0) + 1
                if group["has_momentum"]:
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    direction = mean.mul_(momentum).add_(direction, alpha=1 - momentum)
                norms = direction.norm(dim=0, keepdim=True).clamp(min=1e-12)
                parameter.sub_(direction / norms, alpha=group["lr"])

        split = []
        for group in groups:  # the head has a group of its own
            pairs = list(zip(group["param_names"], group["params"], strict=True))
            for has_momentum in (False, True):
                own = [(name, p) for name, p in pairs if name.endswith("lm_head.weight") == has_momentum]
                if own:
                    names, parameters = map(list, zip(*own, strict=True))
                    split.append({**group, "params": parameters, "param_names": names, "has_momentum": has_momentum})
        return ColumnSGD(split, {"lr": lr})

    def state_bytes(self, parameter: ParamInfo) -> int:
        rows, columns = parameter.shape  # a matrix: it takes nothing else
        return rows * columns * parameter.element_size if parameter.role == "head" else 0

    def step_bytes(self, parameter: ParamInfo, device_type: str, rounding: bool) -> int:
        return parameter.numel * parameter.element_size
