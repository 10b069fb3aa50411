"""The gradient of the dense W of a layer, dW = dy^T x, of which backward keeps only what the layer trains.

An identity that is put on y keeps x, and computes dW when dy comes. The gradient that is asked for is that of a number
beside each y, so those of parameters are dropped as they come, and neither DDP nor an update inside backward wakes.
Layers compute y through a dense W meanwhile, as those that read one x together run no hooks.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.layers.base import ReplacedLinear

Take = Callable[[Tensor], None]


def dense_gradients(
    layers: Mapping[str, ReplacedLinear], loss: Callable[[], Tensor], take: Callable[[str, Tensor], None]
) -> None:
    """Call `take(name, dW)` for each layer, in backward's order, with the gradient of `loss()`, a scalar: (out, in), in
    the dtype of the layer's arithmetic. Layers must not be changed before this returns."""
    anchors = []
    with ExitStack() as at_the_end:
        for name, layer in layers.items():
            anchor = torch.zeros((), device=next(layer.parameters()).device, requires_grad=True)
            anchors.append(anchor)
            at_the_end.callback(setattr, layer, "path", layer.path)
            layer.path = "composed"

            at_the_end.callback(layer.register_forward_hook(_tapped(anchor, partial(take, name))).remove)
        with torch.enable_grad():
            torch.autograd.grad(loss(), anchors)


def _tapped(anchor: Tensor, take: Take) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(y, anchor, args[0].detach(), take)
        return tapped

    return hook


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, take: Take) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        rows = grad_y.flatten(0, -2)
        ctx.take(rows.t() @ x.flatten(0, -2).to(rows.dtype))
        return grad_y, torch.zeros((), device=grad_y.device), None, None
