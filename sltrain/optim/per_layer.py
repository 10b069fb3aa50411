"""Updates inside backward: each gradient is used as soon as it is complete, then freed.

Backward makes the gradients from the last layer to the first. A hook on each parameter (torch's
register_post_accumulate_grad_hook) sums its gradient over ranks, lets the inner optimizer update this one parameter and
drops the gradient. One gradient is held at a time instead of all: a dense 7B model's 13 GB in bfloat16 become 0.3 GB,
those of its embedding. The idea is LOMO's (Lv et al., arXiv 2306.09782); GaLore and SLTrain measure with it. No later
step of backward reads the weight: a gradient is complete only after all uses of the parameter. A parameter used twice
(tied weights) is updated once, after both.

    for i, micro_batch in enumerate(micro_batches):
        loss = model(micro_batch)
        optimizer.before_backward(is_last=i + 1 == len(micro_batches))
        loss.backward()
    squared_norm, num_updated, num_skipped = optimizer.finish()

With several micro-batches the gradients accumulate until the last one, in whose backward they are used one by one:
exactly the ordinary update, with any optimizer. So it saves memory only with one micro-batch an update.

The host synchronizes once a tensor, to check that the gradient is finite before it is used: a bad one must leave
weights and moments as they are, and only torch's fused AdamW has a device flag for that. Such a tensor is skipped and
counted; the others are updated. Clipping by the norm of all gradients would need all of them, so only clipping by
each parameter's own norm is offered.

All ranks must reduce the same tensor at a time, but autograd promises no order (rows may be padded on one rank only).
So one order is fixed for all ranks, and a gradient that is complete before its turn waits. In the first update the
order is the model's, reversed; then the positions at which gradients arrived, summed over ranks, order all later ones.
DDP does the same with its buckets. Where processes hold shards, gradients come a unit at a time: per_unit.py.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.numeric import clip_factor, norm_in_pieces
from sltrain.optim.wrapper import WrappedOptimizer, only


class UpdateInsideBackward(WrappedOptimizer):
    """What all updates inside backward share; a subclass says when a gradient is used, and how.

    Args:
        inner: any optimizer of build.py.
        parameters: those of the model whose gradients are used.
        grad_clip_per_parameter: largest norm of one parameter's gradient, summed over ranks and micro-batches; a larger
            one is scaled down.
    """

    def __init__(
        self, inner: Optimizer, parameters: Iterable[nn.Parameter], grad_clip_per_parameter: float | None
    ) -> None:
        super().__init__(inner)
        self.grad_clip_per_parameter = grad_clip_per_parameter
        self._hooks = [each.register_post_accumulate_grad_hook(self._on_gradient) for each in parameters]
        self._begin()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that still has a gradient, and free it: none after a backward that `before_backward`
        announced, all after any other."""
        assert closure is None, "evaluate the loss before the step"
        self.finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients and the current update."""
        super().zero_grad(set_to_none)
        self._begin()

    def close(self) -> None:
        """Remove the hooks: backward then updates nothing."""
        for hook in self._hooks:
            hook.remove()
        super().close()

    def before_backward(self, is_last: bool, is_bad: bool = False) -> None:
        """Announce the backward of one micro-batch, the update's last one or not. The gradients of a bad one are freed
        as they come and not used: those of a loss that is not finite."""
        self._is_armed, self._is_bad = is_last, is_bad

    @torch.no_grad()
    def finish(self) -> tuple[float, int, int]:
        """End the update: use the remaining gradients.

        Returns:
            the sum of the squared norms of the gradients that were used, before clipping.
            how many tensors were updated.
            how many tensors were skipped because their gradients were not finite.
        """
        self._is_armed = False
        self._use_rest()
        # Exactly rounded: the sum does not depend on the order of gradients, which a continued run has yet to learn
        result = math.fsum(self._squared_norms), self._num_updated, self._num_skipped
        self._begin()
        return result

    def _begin(self) -> None:
        """Reset what belongs to one update."""
        self._is_armed = self._is_bad = False
        self.has_begun = False  # whether the current update has changed weights or moments
        self._squared_norms: list[float] = []
        self._num_updated, self._num_skipped = 0, 0

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        """Called by autograd when the gradient of `parameter` is complete for this micro-batch."""
        assert isinstance(parameter, nn.Parameter)
        if self._is_bad:
            parameter.grad = None
        elif self._is_armed:
            self._use(parameter)

    @abstractmethod
    def _use(self, parameter: nn.Parameter) -> None:
        """The gradient of `parameter` is complete for this update."""

    @abstractmethod
    def _use_rest(self) -> None:
        """Update by the gradients that are still there."""

    def _admit(self, grad: Tensor, norm: Tensor, value: float) -> bool:
        """Whether a gradient of this norm, on its device and on the host, is used: clipped, if it is finite. Counts
        it."""
        if not math.isfinite(value):
            self._num_skipped += 1
            return False
        self._squared_norms.append(value**2)
        self._num_updated += 1
        if self.grad_clip_per_parameter is not None:
            grad.mul_(clip_factor(norm, self.grad_clip_per_parameter))
        return True


class PerLayerUpdate(UpdateInsideBackward):
    """Makes `inner` update each parameter inside backward.

    The model is used bare, without DDP, and with activation checkpointing of use_reentrant=False. A parameter must get
    a gradient on all ranks or on none.

    Args:
        inner: any optimizer of build.py.
        parameters: all parameters of the model in its order; needed with several ranks, for the order of reduction.
        reduce_grad: sums a tensor over ranks, in place; None for one process.
        grad_clip_per_parameter: see UpdateInsideBackward.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        parameters: Iterable[nn.Parameter] = (),
        reduce_grad: Callable[[Tensor], object] | None = None,
        grad_clip_per_parameter: float | None = None,
    ) -> None:
        self.reduce_grad = reduce_grad
        self._groups = {parameter: group for group in inner.param_groups for parameter in group["params"]}
        model_order = {parameter: number for number, parameter in enumerate(parameters)}
        assert self.reduce_grad is None or self._groups.keys() <= model_order.keys()
        self._order = sorted(self._groups, key=lambda parameter: model_order.get(parameter, 0), reverse=True)
        self._order_is_learned = False
        super().__init__(inner, self._groups, grad_clip_per_parameter)

    def _begin(self) -> None:
        super()._begin()
        self._num_done = 0  # parameters of `_order` that had their turn
        self._arrived: dict[nn.Parameter, None] = {}  # those whose last gradient is complete, in order of arrival

    def _use_rest(self) -> None:
        for parameter in self._order[self._num_done :]:
            if parameter.grad is not None:
                self._update(parameter)
        if self.reduce_grad is not None and not self._order_is_learned:
            self._learn_order(self.reduce_grad)

    def _use(self, parameter: nn.Parameter) -> None:
        self._arrived[parameter] = None
        if self.reduce_grad is None:
            self._update(parameter)
            return
        while self._num_done < len(self._order) and self._order[self._num_done] in self._arrived:
            self._update(self._order[self._num_done])
            self._num_done += 1

    def _update(self, parameter: nn.Parameter) -> None:
        """Update one parameter by its gradient, if that is finite, and free it. Synchronizes with the device."""
        grad = parameter.grad
        assert grad is not None
        self.has_begun = True
        if self.reduce_grad is not None and grad.numel():
            self.reduce_grad(grad)
        norm = norm_in_pieces(grad, torch.promote_types(grad.dtype, torch.float32))
        if self._admit(grad, norm, norm.item()):
            with only(self.inner, self._groups[parameter], parameter):
                self.inner.step()
        parameter.grad = None

    def _learn_order(self, reduce: Callable[[Tensor], object]) -> None:
        """Fix the order in which gradients arrived, summed over ranks; parameters without one come last."""
        came = {parameter: position for position, parameter in enumerate(self._arrived)}
        positions = torch.tensor([float(came.get(p, len(self._order))) for p in self._order], dtype=torch.float64)
        positions = positions.to(self._order[0].device)
        reduce(positions)
        ranked = sorted(zip(positions.tolist(), range(len(self._order)), strict=True))
        self._order = [self._order[index] for _, index in ranked]
        self._order_is_learned = True
