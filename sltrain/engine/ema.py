"""ema=0.999: an exponential average of the trained weights, which evaluations, exports and later commands use.

    after every update, for each trained tensor:   average <- decay * average + (1 - decay) * weight

Averages begin at the weights of step 0 and are float32, also of bfloat16 weights: steps of a thousandth are below what
bfloat16 can hold. Of W = (alpha / rank) B A + S, the tensors A, B and the values of S are averaged, each by itself.
Training does not read them; they are the state of an action, so checkpoints hold them (`action.ema.pt`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.numeric import pieces

NAME = "ema"  # of the action
FILE = f"action.{NAME}.pt"  # in a checkpoint


class Average:
    """The averages of a model's trained parameters by name; `decay` is the share that an update leaves of them. `named`
    are the parameters as this process holds them (a strategy's `named_parameters`); None: those of the model."""

    def __init__(self, model: nn.Module, decay: float, named: Iterable[tuple[str, nn.Parameter]] | None = None) -> None:
        self._named, self.decay = dict(model.named_parameters() if named is None else named), decay
        self.values = {name: p.detach().to(torch.float32, copy=True) for name, p in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._named.items() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the weights."""
        for name, parameter in self._trained():
            for average, weight in pieces(self.values[name], parameter.detach()):
                average.lerp_(weight.float(), 1 - self.decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside this context the model computes with the averages, in the dtype of its weights."""
        kept = {name: parameter.detach().clone() for name, parameter in self._trained()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A parameter that joined the model since then keeps its present value as its average."""
        for name, value in self.values.items():
            if name in state_dict:
                if state_dict[name].shape != value.shape:
                    raise ValueError(f"the average of {name} has shape {tuple(state_dict[name].shape)}")
                value.copy_(state_dict[name])
