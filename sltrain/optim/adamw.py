"""AdamW that rounds weights stochastically, or keeps float32 moments of bfloat16 weights, where torch's own AdamW
(kinds/adamw.py) cannot.

Its state has the names of torch's, so a checkpoint of either fits the other. It computes in float32 (float64 for
float64) and rounds each result once, when it is stored. It works on pieces of 4M elements, so the float32 copies of an
update take some 100 MB, whatever the size of the largest parameter.

An update, with g the gradient, t the number of this update, and d the learning rate (Loshchilov & Hutter, arXiv
1711.05101):

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    w <- (1 - d weight_decay) w - d (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

bfloat16 moments lose small changes. At beta2 = 0.999 v has settled where one update moves it by a thousandth, less than
8 bits can show (half a unit in the last place is 1/512 to 1/256 of v), so most of what is added or decayed is lost.
Measured with noise of constant size over 4000 updates, with torch's fused AdamW: v is 1.44 of what it should be; at
beta2 = 0.95, or in float32, 1.00 of it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.numeric import pieces
from sltrain.optim.rounding import Draws, round_into
from sltrain.optim.wrapper import with_gradients


class AdamW(Optimizer):
    """AdamW, see above.

    Args:
        params: contiguous parameters or groups of them.
        seed: of stochastic rounding, for bfloat16 parameters; None rounds to nearest.
        moments_dtype: of both moments; None: that of each parameter.
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
        moments_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments_dtype = moments_dtype
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self.draws = {} if seed is None else {p: Draws(seed, number) for number, p in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "evaluate the loss before the step"
        for group, parameter in with_gradients(self):
            self._update(group, parameter)

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the host, where it is read
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(
                    parameter, dtype=self.moments_dtype, memory_format=torch.contiguous_format
                )
        state["step"] += 1
        update, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
        bits = None
        if self.draws and parameter.dtype == torch.bfloat16:
            bits = self.draws[parameter].bits(parameter, update)
        assert parameter.grad is not None
        tensors = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"], parameter.grad.contiguous())
        first = 0 if bits is None else bits.position
        for stored_w, stored_m, stored_v, stored_g in pieces(*tensors, first=first):
            w, m, v, g = _exact(stored_w), _exact(stored_m), _exact(stored_v), _exact(stored_g)
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            del g  # the copies below take its memory
            if m is not stored_m:
                stored_m.copy_(m)
                stored_v.copy_(v)
            scale = v.sqrt().div_(math.sqrt(1 - beta2**update)).add_(group["eps"])
            w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, scale, value=-lr / (1 - beta1**update))
            del scale
            if bits is None:
                stored_w.copy_(w)
            else:
                round_into(stored_w, w, bits)
            del w, m, v  # before the copies of the next piece


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the computation: itself if it is float32 or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
