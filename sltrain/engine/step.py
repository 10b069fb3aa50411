"""One update of a model: micro-batches -> gradients -> moved weights.

The loss of an update is the mean over all its tokens, whatever micro-batch or rank they are in:

    loss = (sum over ranks and micro-batches of the token losses) / (number of their predicted tokens)

so every micro-batch's summed loss is divided by the global token count, which is known before the first backward.

OrdinaryStep   collects all gradients, then lets the optimizer move all weights. The model is wrapped in DDP, which
               averages over ranks, hence a factor world_size. An update whose loss or gradient is not finite is
               skipped; the one host read of a step serves that test and the log.
PerLayerStep   lets the optimizer move each weight inside the last backward, and sum its gradient over ranks itself:
               the model is bare and there is no factor. By the time all gradients are known the first have been used,
               so the loss of all micro-batches and ranks is read before the last backward, and a bad one skips the
               whole update; a bad gradient skips its own tensor.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sltrain.engine.distributed import Ranks
from sltrain.numeric import clip_factor, norm_in_pieces

Inputs = Sequence[tuple[Tensor | None, ...]]  # one tuple a micro-batch, as micro_batch.py makes them
OnSkip = Callable[[str], None]


@dataclass
class StepResult:
    """What one update did."""

    loss: float  # mean token loss of the update, natural log, over all ranks
    grad_norm: float  # global L2 norm before clipping; PerLayerStep: of the gradients that were finite
    skipped: bool = False  # nothing was updated
    num_skipped_tensors: int | None = (
        None  # whose gradients were not finite; None: such an update is skipped as a whole
    )


class UpdateStep(ABC):
    """Makes the updates of one model with one optimizer."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def run(self, micro_batches: Inputs, num_targets: int, on_skip: OnSkip = lambda name: None) -> StepResult:
        """Make one update.

        Args:
            micro_batches: arguments of the model, those of this rank, on its device; the model gives the summed token
                loss of each, a scalar.
            num_targets: predicted tokens of the whole update, over all ranks.
            on_skip: called with the name of what was not finite when the update is skipped.
        """

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Whether weights and optimizer state are those after a whole number of updates: False while weights move, and
        after an error in that."""

    @property
    def bucket_bytes(self) -> int:
        """What is held between updates besides weights and optimizer state."""
        return 0

    def close(self) -> None:
        """Let go of the model, for which another step is made."""
        return


class OrdinaryStep(UpdateStep):
    """Updates all weights at once, after the last backward.

    Args:
        model: the bare model; with several ranks it is wrapped in DDP here.
        grad_clip: largest global gradient norm, or None.
        grad_clip_per_parameter: largest norm of one parameter's gradient, or None; a larger one is scaled down.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        grad_clip: float | None = None,
        grad_clip_per_parameter: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.ranks = ranks.wrap(model), optimizer, ranks
        self.grad_clip, self.grad_clip_per_parameter = grad_clip, grad_clip_per_parameter
        self._is_whole = True

    @property
    def is_whole(self) -> bool:
        return self._is_whole

    @property
    def bucket_bytes(self) -> int:
        return self.ranks.bucket_bytes(self.model)

    def close(self) -> None:
        del self.model  # DDP takes its hooks from the parameters when it is gone

    def run(self, micro_batches: Inputs, num_targets: int, on_skip: OnSkip = lambda name: None) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, dtype = self._backward(micro_batches, num_targets)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # In float32: the norm of bfloat16 gradients would itself be rounded to three digits.
        exact = torch.promote_types(dtype, parameters[0].dtype)
        if self.ranks.device.type == "cuda" or gradients[0].dtype == exact:
            norms = torch._foreach_norm(gradients, dtype=exact)  # one launch for many
        else:
            norms = tuple(norm_in_pieces(gradient, exact) for gradient in gradients)
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
        loss_value, norm_value = torch.stack([self.ranks.sum_(loss_sum), norm]).tolist()
        result = StepResult(loss_value / max(num_targets, 1), norm_value)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            result.skipped = True
            on_skip(_first_non_finite(self.model))
            return result
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        if self.grad_clip_per_parameter is not None:
            torch._foreach_mul_(gradients, [clip_factor(norm, self.grad_clip_per_parameter) for norm in norms])
        self._is_whole = False
        self.optimizer.step()
        self._is_whole = True
        return result

    def _backward(self, micro_batches: Inputs, num_targets: int) -> tuple[Tensor, torch.dtype]:
        """Fill the gradients. Returns this rank's sum of losses, 0-d float32, and the dtype of the model's losses."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        scale = self.ranks.world_size / max(num_targets, 1)
        for i, micro_batch in enumerate(micro_batches):
            is_last = i + 1 == len(micro_batches)
            with nullcontext() if is_last else self.ranks.no_sync(self.model):  # gradients cross ranks once an update
                loss = self.model(*micro_batch)
                (loss * scale).backward()
            loss_sum += loss.detach()
        return loss_sum, loss.dtype


class PerLayerOptimizer(Protocol):
    """What PerLayerStep needs of its optimizer, besides torch's protocol; optim/per_layer.py has it."""

    has_begun: bool  # whether the update under way has changed weights or moments

    def zero_grad(self) -> None:
        """Drop gradients and an update that was begun."""

    def before_backward(self, is_last: bool) -> None:
        """Announce the backward of one micro-batch, the update's last one or not."""

    def finish(self) -> tuple[float, int, int]:
        """End the update, on all ranks: sum of squared norms of the gradients used, number of tensors updated, number
        of gradients left out because they were not finite."""
        ...


class PerLayerStep(UpdateStep):
    """Updates each weight inside the last backward.

    Args:
        model: the bare model.
        optimizer: a torch optimizer that is a PerLayerOptimizer and sums gradients over `ranks`.
    """

    def __init__(self, model: nn.Module, optimizer: PerLayerOptimizer, ranks: Ranks) -> None:
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self._per_layer: PerLayerOptimizer = optimizer

    @property
    def is_whole(self) -> bool:
        return not self._per_layer.has_begun

    def run(self, micro_batches: Inputs, num_targets: int, on_skip: OnSkip = lambda name: None) -> StepResult:
        self._per_layer.zero_grad()
        num_targets = max(num_targets, 1)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        for i, micro_batch in enumerate(micro_batches):
            is_last = i + 1 == len(micro_batches)
            loss = self.model(*micro_batch)
            loss_sum += loss.detach()
            if is_last and not math.isfinite(self.ranks.sum_(loss_sum).item()):  # from here on the sum of all ranks
                self._per_layer.zero_grad()
                on_skip("loss")
                return StepResult(loss_sum.item() / num_targets, math.nan, skipped=True, num_skipped_tensors=0)
            self._per_layer.before_backward(is_last)
            (loss * (1 / num_targets)).backward()

        squared_norm, num_updated, num_skipped = self._per_layer.finish()
        result = StepResult(loss_sum.item() / num_targets, math.sqrt(squared_norm), num_skipped_tensors=num_skipped)
        if num_updated == 0:
            result.skipped = True
            on_skip("every gradient")
        return result


def _first_non_finite(model: nn.Module) -> str:
    """Name of the first parameter whose gradient is not finite, or `loss`."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"gradient of {name.removeprefix('module.')}"
    return "loss"
