"""One update of a model: micro-batches -> gradients -> new weights.

The loss of an update is the mean over all its tokens, whatever micro-batch or rank they are in:

    loss = (sum over ranks and micro-batches of the token losses) / (number of their predicted tokens)

so every micro-batch's summed loss is divided by the global token count, which is known before the first backward.

OrdinaryStep   collects all gradients, then lets the optimizer update all weights. Its strategy (strategy.py) averages
               over ranks, hence a factor world_size. An update whose loss or gradient is not finite is skipped; the
               one host synchronization of a step serves that test and the log.
PerLayerStep   lets the optimizer update each weight inside the last backward. It sums the gradient over ranks itself:
               the model is bare and there is no factor; of a model in shards the strategy has averaged it. Gradients
               are used before all of them are known, so the loss of all micro-batches and ranks is checked before the
               last backward: if it is not finite the whole update is skipped; a gradient that is not finite skips its
               own tensor.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sltrain.engine.strategy import Strategy
from sltrain.numeric import clip_factor, norm_in_pieces

Inputs = Sequence[tuple[Tensor | None, ...]]  # one tuple a micro-batch, as micro_batch.py makes them
OnSkip = Callable[[str], None]


@dataclass
class StepResult:
    """What one update did."""

    loss: float  # mean token loss of the update, natural log, over all ranks
    grad_norm: float  # global L2 norm before clipping; PerLayerStep: of the finite gradients
    num_skipped_tensors: int | None = None  # whose gradients were not finite; None for OrdinaryStep
    not_finite: str | None = None  # what made it skip the whole update; None: weights were updated

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated."""
        return self.not_finite is not None


class UpdateStep(ABC):
    """Makes the updates of one model with one optimizer."""

    optimizer: torch.optim.Optimizer
    bucket_bytes = 0  # held between updates besides weights and optimizer state

    def run(
        self,
        micro_batches: Inputs,
        num_targets: int,
        on_skip: OnSkip = lambda name: None,
        before_step: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Make one update.

        Args:
            micro_batches: this rank's arguments of the model, on its device; for each the model returns the summed
                token loss, a scalar.
            num_targets: predicted tokens of the whole update, over all ranks.
            on_skip: called when the update is skipped, with the name of what was not finite.
            before_step: called by OrdinaryStep with the gradients in place, clipped, right before the optimizer's step.
        """
        result = self._update(micro_batches, max(num_targets, 1), before_step)
        if result.not_finite is not None:
            on_skip(result.not_finite)
        return result

    @abstractmethod
    def _update(self, micro_batches: Inputs, num_targets: int, before_step: Callable[[], None]) -> StepResult:
        """`run` for at least one predicted token."""

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """False while weights change and after an error in that: weights and optimizer state are then those of no
        whole number of updates."""

    def close(self) -> None:
        """Release the model, so that another step can be built for it."""
        return


class OrdinaryStep(UpdateStep):
    """Updates all weights at once, after the last backward.

    Args:
        model: the bare model; the strategy wraps it here.
        optimizer: of the strategy's `named_parameters`.
        grad_clip: largest global gradient norm, or None.
        grad_clip_per_parameter: largest norm of one parameter's gradient, or None; a larger one is scaled down.
    """

    is_whole = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        strategy: Strategy,
        grad_clip: float | None = None,
        grad_clip_per_parameter: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.strategy = strategy.wrap(model), optimizer, strategy
        self.grad_clip, self.grad_clip_per_parameter = grad_clip, grad_clip_per_parameter
        self.bucket_bytes = strategy.bucket_bytes(model)

    def close(self) -> None:
        del self.model
        self.strategy.release()

    def _update(self, micro_batches: Inputs, num_targets: int, before_step: Callable[[], None]) -> StepResult:
        self.strategy.prepare(self.model, micro_batches[0])
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, dtype = self._backward(micro_batches, num_targets)
        parameters = self.strategy.gradients(self.model)
        norms = self.strategy.whole_norms(self._norms(parameters, dtype))
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
        loss_value, norm_value = torch.stack([self.strategy.ranks.sum_(loss_sum), norm]).tolist()
        result = StepResult(loss_value / num_targets, norm_value)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            result.not_finite = self._first_non_finite()
            return result
        self._clip(parameters, norms, norm)
        self.is_whole = False
        before_step()
        self.optimizer.step()
        self.is_whole = True
        return result

    def _norms(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
        """The norm of each parameter's gradient, of a loss of `dtype`. In float32: that of bfloat16 gradients would
        itself be rounded to three digits."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        exact = torch.promote_types(dtype, parameters[0].dtype)
        if self.strategy.ranks.device.type == "cuda" or gradients[0].dtype == exact:
            return list(torch._foreach_norm(gradients, dtype=exact))  # one launch for many
        return [norm_in_pieces(gradient, exact) for gradient in gradients]

    def _clip(self, parameters: list[nn.Parameter], norms: list[Tensor], norm: Tensor) -> None:
        """Scale the gradients down to `grad_clip` or `grad_clip_per_parameter`, given the norm of each and of all."""
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        if self.grad_clip_per_parameter is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, [clip_factor(norm, self.grad_clip_per_parameter) for norm in norms])

    def _first_non_finite(self) -> str:
        """Name of the first parameter whose gradient is not finite on some rank that has a part of it, or `loss`."""
        named = [(name, p.grad) for name, p in self.strategy.named_parameters(self.model)]
        flags = [grad is not None and not bool(torch.isfinite(grad).all()) for _, grad in named]
        names = [name for (name, _), flag in zip(named, self.strategy.anywhere(flags), strict=True) if flag]
        return f"gradient of {names[0].removeprefix('module.')}" if names else "loss"

    def _backward(self, micro_batches: Inputs, num_targets: int) -> tuple[Tensor, torch.dtype]:
        """Fill the gradients. Returns this rank's sum of losses, 0-d float32, and the dtype of the model's losses."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.strategy.ranks.device)
        scale = self.strategy.ranks.world_size / num_targets
        for i, micro_batch in enumerate(micro_batches):
            self.strategy.ranks.tick()
            with self.strategy.accumulating(self.model, is_last=i + 1 == len(micro_batches)):
                loss = self.model(*micro_batch)
                (loss * scale).backward()
            loss_sum += loss.detach()
        return loss_sum, loss.dtype


class PerLayerOptimizer(Protocol):
    """What PerLayerStep needs besides torch's protocol; UpdateInsideBackward (optim/per_layer.py) documents it."""

    has_begun: bool

    def zero_grad(self) -> None: ...
    def before_backward(self, is_last: bool, is_bad: bool) -> None: ...
    def finish(self) -> tuple[float, int, int]: ...


class PerLayerStep(UpdateStep):
    """Updates each weight inside the last backward.

    Args:
        model: the bare model, or one that the strategy has sharded.
        optimizer: a torch optimizer that is a PerLayerOptimizer; of a bare model it sums gradients over ranks.
    """

    def __init__(self, model: nn.Module, optimizer: PerLayerOptimizer, strategy: Strategy) -> None:
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.model, self.optimizer, self.strategy = model, optimizer, strategy
        self._per_layer: PerLayerOptimizer = optimizer

    @property
    def is_whole(self) -> bool:
        return not self._per_layer.has_begun

    def _update(self, micro_batches: Inputs, num_targets: int, before_step: Callable[[], None]) -> StepResult:
        self._per_layer.zero_grad()
        ranks, is_bad = self.strategy.ranks, False
        loss_sum = torch.zeros((), dtype=torch.float32, device=ranks.device)
        scale = (ranks.world_size if self.strategy.is_sharded else 1) / num_targets
        for i, micro_batch in enumerate(micro_batches):
            ranks.tick()
            is_last = i + 1 == len(micro_batches)
            with self.strategy.accumulating(self.model, is_last):
                loss = self.model(*micro_batch)
                loss_sum += loss.detach()
                if is_last:
                    is_bad = not math.isfinite(ranks.sum_(loss_sum).item())  # from here on the sum of all ranks
                self._per_layer.before_backward(is_last, is_bad)
                (loss * scale).backward()  # of a bad loss too: what shards hold of earlier micro-batches goes with it
        if is_bad:
            self._per_layer.zero_grad()
            return StepResult(loss_sum.item() / num_targets, math.nan, num_skipped_tensors=0, not_finite="loss")
        squared_norm, num_updated, num_skipped = self._per_layer.finish()
        not_finite = "every gradient" if num_updated == 0 else None
        return StepResult(loss_sum.item() / num_targets, math.sqrt(squared_norm), num_skipped, not_finite)
