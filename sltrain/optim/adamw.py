"""AdamW that rounds weights stochastically.

torch's own AdamW is used wherever it can do the job (build.py); this one has the same state under the same names, so a
checkpoint of either fits the other. Whatever the parameters' dtype, it computes in float32 (float64 for float64) and
rounds each result once when it is stored. It works through tensors in pieces of 4M elements, so the float32 copies of
an update take some 100 MB, whatever the size of the largest parameter.

An update, with g the gradient, t the number of this update, and d the learning rate (Loshchilov & Hutter, arXiv
1711.05101):

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    w <- (1 - d weight_decay) w - d (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

bfloat16 moments lose small changes. At beta2 = 0.999 v has settled where one update moves it by a thousandth, less than
8 bits can show (half a unit in the last place is 1/512 to 1/256 of v), so what is added or decayed is lost more often
than not. Measured with noise of constant size over 4000 updates, with torch's fused AdamW: v is 1.44 of what it should
be; at beta2 = 0.95, or in float32, 1.00 of it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.numeric import pieces
from sltrain.optim.rounding import generator_of_update, round_into
from sltrain.optim.wrapper import with_gradients


class AdamW(Optimizer):
    """AdamW, see above.

    Args:
        params: parameters or groups of them; contiguous.
        seed: of stochastic rounding, for bfloat16 parameters; None rounds to the nearest.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        seed: int | None = None,
    ) -> None:
        self.seed = seed
        self._numbers: dict[nn.Parameter, int] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._numbers.setdefault(parameter, len(self._numbers))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "evaluate the loss before the step"
        for group, parameter in with_gradients(self):
            assert parameter.grad is not None
            self._update(group, parameter, parameter.grad)

    def _update(self, group: dict[str, Any], parameter: nn.Parameter, grad: Tensor) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        update = int(state["step"])
        store = self._store_weights(parameter, update)
        for w, m, v, g in pieces(parameter.detach(), state["exp_avg"], state["exp_avg_sq"], grad.contiguous()):
            exact_w, exact_m, exact_v = _exact(w), _exact(m), _exact(v)
            add_gradient(exact_m, exact_v, _exact(g), group["betas"])
            m.copy_(exact_m)
            v.copy_(exact_v)
            move_weights(
                exact_w, exact_m, exact_v, update, group["lr"], group["betas"], group["eps"], group["weight_decay"]
            )
            store(w, exact_w)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Its state, made when it is first asked for. `step` stays on the host, where it is read."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def _store_weights(self, parameter: nn.Parameter, update: int) -> Callable[[Tensor, Tensor], object]:
        """What writes exact weights into the parameter's: (to, exact)."""
        if self.seed is None or parameter.dtype != torch.bfloat16:
            return Tensor.copy_
        generator = generator_of_update(parameter.device, self.seed, self._numbers[parameter], update)
        return lambda to, exact: round_into(to, exact, generator)


def add_gradient(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, betas: tuple[float, float]) -> None:
    """In place: m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2; three tensors of one shape."""
    exp_avg.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def move_weights(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Decay the weights and move them by the bias-corrected moments, in place; `update` counts from 1."""
    correction1, correction2 = 1 - betas[0] ** update, 1 - betas[1] ** update
    scale = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(eps)
    weights.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, scale, value=-lr / correction1)


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that updates are computed in: itself if it is float32 or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
