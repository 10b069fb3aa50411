"""The gradient of the dense W of a layer, dW = dy^T x, of which backward keeps only what the layer trains.

An identity that is put on y keeps x, and computes dW when dy comes. The pass leaves no gradient in any parameter, and
so wakes neither DDP nor an update inside backward. Layers compute y through a dense W meanwhile, as those that read one
x together run no hooks.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
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
    with ExitStack() as at_the_end:
        for name, layer in layers.items():
            at_the_end.callback(setattr, layer, "path", layer.path)
            layer.path = "composed"

            def tapped(module: nn.Module, args: tuple[Any, ...], y: Tensor, name: str = name) -> Tensor:
                x: Tensor = args[0]
                found: Tensor = _Tap.apply(y, x.detach(), lambda gradient: take(name, gradient))
                return found

            at_the_end.callback(layer.register_forward_hook(tapped).remove)
        with torch.enable_grad():
            trained = [p for layer in layers.values() for p in layer.parameters(recurse=False) if p.requires_grad]
            torch.autograd.grad(loss(), trained)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, take: Take) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        rows = grad_y.flatten(0, -2)
        ctx.take(rows.t() @ x.flatten(0, -2).to(rows.dtype))
        return grad_y, None, None
