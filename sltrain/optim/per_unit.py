"""Updates inside backward where each process holds shards of the parameters.

fully_shard (FSDP2) sums the gradients of a unit, a decoder layer or what lies outside of them, in one piece when its
backward is over, and then calls the post-accumulate hook of each of its parameters (`foreach_reduce` in torch's
fsdp/_fully_shard/_fsdp_collectives.py). When all of a unit have come, this process's rows are updated and the piece is
freed: of a model of L layers, 1 / n of one unit's gradients is held instead of 1 / n of all.

All ranks come to the same units in the same order, since each was summed over them. The norms of a unit's gradients are
summed together, so the host synchronizes once a unit. Optimizers of whole tensors get those of the unit, each on its
owner (whole_tensors.py). What one update consists of is the same as in per_layer.py.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sltrain.numeric import norm_in_pieces
from sltrain.optim.per_layer import UpdateInsideBackward


class PerUnitUpdate(UpdateInsideBackward):
    """Makes `inner` update the parameters of each unit inside backward.

    Args:
        inner: any optimizer of build.py over what this process holds, or a WholeTensors.
        units: the trained parameters of the model, those together whose gradients are summed together.
        take: parameters of the model -> what `inner` knows of those with a gradient: plain tensors, with this process's
            part of the gradients, which the model gives up.
        whole_norms: from the norms of these parts to those of whole gradients, on all ranks.
        grad_clip_per_parameter: see UpdateInsideBackward.
    """

    def __init__(
        self,
        inner: Optimizer,
        units: Sequence[Sequence[nn.Parameter]],
        take: Callable[[Iterable[nn.Parameter]], list[nn.Parameter]],
        whole_norms: Callable[[list[Tensor]], list[Tensor]],
        grad_clip_per_parameter: float | None = None,
    ) -> None:
        self._units, self._take, self._whole_norms = units, take, whole_norms
        self._unit_of = {parameter: unit for unit in units for parameter in unit}
        super().__init__(inner, self._unit_of, grad_clip_per_parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._unit_of:
            parameter.grad = None
        super().zero_grad(set_to_none)

    def _begin(self) -> None:
        super()._begin()
        self._arrived: set[nn.Parameter] = set()

    def _use(self, parameter: nn.Parameter) -> None:
        self._arrived.add(parameter)
        unit = self._unit_of[parameter]
        if self._arrived.issuperset(unit):
            self._update(unit)

    def _use_rest(self) -> None:
        for unit in reversed(self._units):
            self._update(unit)

    def _update(self, unit: Sequence[nn.Parameter]) -> None:
        """Update a unit by those of its gradients that are finite, and free them. All ranks come here together."""
        taken = self._take(unit)
        if not taken:
            return
        self.has_begun = True
        grads = [parameter.grad for parameter in taken if parameter.grad is not None]
        norms = self._whole_norms([norm_in_pieces(g, torch.promote_types(g.dtype, torch.float32)) for g in grads])
        for parameter, grad, norm, value in zip(taken, grads, norms, torch.stack(norms).tolist(), strict=True):
            if not self._admit(grad, norm, value):
                parameter.grad = None
        self.inner.step()  # no other parameter has a gradient
        for parameter in taken:
            parameter.grad = None
