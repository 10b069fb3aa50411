"""Updates inside backward: a gradient is used as soon as it is complete, and freed.

Backward makes the gradients from the last layer to the first. A hook on each parameter (torch's
register_post_accumulate_grad_hook) sums its gradient over ranks, lets the inner optimizer update this one parameter and
drops the gradient, so that one is held at a time instead of all: a dense 7B model's 13 GB in bfloat16 become 0.3 GB,
those of its embedding. The idea is LOMO's (Lv et al., arXiv 2306.09782); GaLore and SLTrain measure with it. No later
step of backward reads the weight again: a gradient is complete only when all that use the parameter have been through.
A parameter used twice (tied weights) is updated once, after both.

    for i, micro_batch in enumerate(micro_batches):
        loss = model(micro_batch)
        optimizer.before_backward(is_last=i + 1 == len(micro_batches))
        loss.backward()
    squared_norm, num_updated, num_skipped = optimizer.finish()

Of an update that has several micro-batches the gradients wait for the last one, in whose backward they go one by one:
exactly the ordinary update, with any optimizer. So it saves memory only with one micro-batch an update.

The host waits once a tensor: whether a gradient is finite is read before it is used, because a bad one must leave
weights and moments as they are, and only one of the optimizers (torch's fused AdamW) could be told so on the device.
Such a tensor is skipped and counted; the others are updated. Clipping by the norm of all gradients would need all of
them; that of each parameter's own is offered.

Ranks must all send the same tensor, but autograd promises no order (on one rank rows may be padded, on the other not).
So there is one order for all, and a gradient that is complete before its turn waits. For the first update the order is
the model's, backwards; then each rank tells in which its gradients came, and the sum of those positions over ranks
orders all later ones. DDP does the same with its buckets.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sltrain.numeric import clip_factor, norm_in_pieces
from sltrain.optim.wrapper import WrappedOptimizer, only


class PerLayerUpdate(WrappedOptimizer):
    """Makes `inner` update each parameter inside backward.

    The model is used bare, without DDP, and activation checkpointing with use_reentrant=False. On several ranks a
    parameter that gets no gradient must get none on any of them.

    Args:
        inner: any optimizer of build.py.
        parameters: all parameters of the model in its order; needed with several ranks, for the order of sending.
        reduce_grad: sums a tensor over ranks, in place; None for one process.
        grad_clip_per_parameter: largest norm of one parameter's gradient, summed over ranks and micro-batches; a larger
            one is scaled down.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        parameters: Iterable[nn.Parameter] = (),
        reduce_grad: Callable[[Tensor], object] | None = None,
        grad_clip_per_parameter: float | None = None,
    ) -> None:
        super().__init__(inner)
        self.reduce_grad = reduce_grad
        self.grad_clip_per_parameter = grad_clip_per_parameter
        self._group_index: dict[nn.Parameter, int] = {}  # not the group: load_state_dict makes new ones
        self._order: list[nn.Parameter] = []
        self._order_is_learned = False
        self._hooks: list[RemovableHandle] = []
        for index in range(len(self.param_groups)):
            self._hook_group(index)
        model_order = {parameter: number for number, parameter in enumerate(parameters)}
        assert self.reduce_grad is None or all(parameter in model_order for parameter in self._order)
        self._order.sort(key=lambda parameter: model_order.get(parameter, 0), reverse=True)
        self._begin()

    # ---- the ordinary face

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that still has a gradient, and free it. After a backward that `before_backward`
        announced there is none; after any other, these are all."""
        assert closure is None, "evaluate the loss before the step"
        self.finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and an update that was begun."""
        super().zero_grad(set_to_none)
        self._begin()

    def close(self) -> None:
        """Remove the hooks: from now on backward updates nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().close()

    # ---- the face towards the training step

    def before_backward(self, is_last: bool) -> None:
        """Announce the backward of one micro-batch, the update's last one or not."""
        self._is_armed = is_last

    @torch.no_grad()
    def finish(self) -> tuple[float, int, int]:
        """End the update: use the gradients that are still there.

        Returns:
            the sum of the squared norms of the gradients that were used, before clipping.
            how many tensors were updated.
            how many gradients were not finite and left out.
        """
        self._is_armed = False
        for parameter in self._order[self._num_done :]:
            if parameter.grad is not None:
                self._update(parameter)
        if self.reduce_grad is not None and not self._order_is_learned:
            self._learn_order()
        result = self._squared_norm, self._num_updated, self._num_skipped
        self._begin()
        return result

    # ---- inside backward

    def _begin(self) -> None:
        """Nothing of the next update has been done."""
        self._is_armed = False
        self.has_begun = False  # whether the update under way has changed weights or moments
        self._squared_norm, self._num_updated, self._num_skipped = 0.0, 0, 0
        self._num_done = 0  # parameters that had their turn, in order
        self._arrived: dict[nn.Parameter, None] = {}  # those whose last gradient has come, as they came

    def _hook_group(self, index: int) -> None:
        for parameter in self.param_groups[index]["params"]:
            if parameter not in self._group_index:
                self._group_index[parameter] = index
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))
                self._order.append(parameter)

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        """Called by autograd when the gradient of `parameter` is complete for this micro-batch."""
        if not self._is_armed:
            return
        assert isinstance(parameter, nn.Parameter)
        self._arrived[parameter] = None
        if self.reduce_grad is None:
            self._update(parameter)
            return
        while self._num_done < len(self._order) and self._order[self._num_done] in self._arrived:
            self._update(self._order[self._num_done])
            self._num_done += 1

    def _update(self, parameter: nn.Parameter) -> None:
        """Update one parameter by its gradient, if that is finite, and free it."""
        grad = parameter.grad
        assert grad is not None
        self.has_begun = True
        if self.reduce_grad is not None and grad.numel():
            self.reduce_grad(grad)
        if (norm := self._count(grad)) is not None:
            if self.grad_clip_per_parameter is not None:
                grad.mul_(clip_factor(norm, self.grad_clip_per_parameter))
            with only(self.inner, self.param_groups[self._group_index[parameter]], parameter):
                self.inner.step()
            self._num_updated += 1
        parameter.grad = None

    def _count(self, grad: Tensor) -> Tensor | None:
        """The gradient's norm, 0-d in float32 or more, counted with the others; None if it is not finite. Waits for
        the device."""
        norm = norm_in_pieces(grad, torch.promote_types(grad.dtype, torch.float32))
        value = norm.item()
        if not math.isfinite(value):
            self._num_skipped += 1
            return None
        self._squared_norm += value**2
        return norm

    def _learn_order(self) -> None:
        """Order the parameters as their gradients came, those that did not come last, equally on all ranks."""
        came = {parameter: position for position, parameter in enumerate(self._arrived)}
        positions = torch.tensor([float(came.get(p, len(self._order))) for p in self._order], dtype=torch.float64)
        positions = positions.to(self._order[0].device)
        assert self.reduce_grad is not None
        self.reduce_grad(positions)
        ranked = sorted(zip(positions.tolist(), range(len(self._order)), strict=True))
        self._order = [self._order[index] for _, index in ranked]
        self._order_is_learned = True
