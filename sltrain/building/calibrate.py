"""Which inputs the projections of a model see: rows of text go through it, decoder layer by decoder layer.

Each decoder layer is run twice. First a copy of it with the dense matrices that its projections are to begin near, to
see the inputs of each; then, once these are fitted, the layer as it is, for the inputs of the next. So an error in one
layer is known to all later ones, as in SparseGPT (arXiv 2301.00774, authors' code).

Besides the model there exist: the hidden states of all rows, one dense decoder layer, and X^T X of its four inputs.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.engine.micro_batch import MicroBatch
from sltrain.models.llama import Grid, LlamaForCausalLM


class LayerInputs:
    """The hidden states of micro-batches before decoder layer `number` of a model, the first at the beginning."""

    @torch.no_grad()
    def __init__(self, model: LlamaForCausalLM, batches: list[MicroBatch]) -> None:
        self.model, self.number = model, 0
        with self._arithmetic():
            self.states = [self._enter(batch) for batch in batches]

    @property
    def prefix(self) -> str:
        """What names of modules of the decoder layer begin with."""
        return f"model.layers.{self.number}."

    @torch.no_grad()
    def moments(self, names: Iterable[str], dense: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """X^T X / n, (in, in) float32, of the n inputs X of each of these projections of the decoder layer, computed
        with the matrices `dense(name)`, (out, in), in their place. Those of the same inputs are one tensor. Raises
        ValueError for inputs that are not finite."""
        decoder, moments = deepcopy(self.model.model.layers[self.number]), _Moments()
        for name in names:
            parent, _, leaf = name.removeprefix(self.prefix).rpartition(".")
            linear = _linear(decoder.get_submodule(f"{parent}.{leaf}"), dense(name))
            linear.register_forward_pre_hook(partial(moments.add, name))
            setattr(decoder.get_submodule(parent), leaf, linear)
        with self._arithmetic():
            for x, grid in self.states:
                decoder(x, grid)
        return moments.means(sum(len(x) for x, _ in self.states))

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the decoder layer as it is now."""
        decoder = self.model.model.layers[self.number]
        with self._arithmetic():
            self.states = [(decoder(x, grid), grid) for x, grid in self.states]
        self.number += 1

    def _enter(self, batch: Any) -> tuple[Tensor, Grid]:
        ids, _, rows, *positions = batch
        return self.model.model.enter(ids, rows, None, *positions)

    def _arithmetic(self) -> Any:
        return self.model.arithmetic(self.model.lm_head.weight.device.type)


class _Moments:
    """Sums of x^T x by the name of the module that reads x."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}  # name -> the first that reads the same x: of q, k, v the first
        self.last: tuple[Tensor | None, str] = (None, "")

    def add(self, name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        """Add what the module is about to read. Modules that read the same x follow each other."""
        (x,) = inputs
        if x is self.last[0]:
            self.first[name] = self.last[1]
            return
        self.first[name], self.last = name, (x, name)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).float()
            total = self.sums.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1]))
            total.addmm_(rows.t(), rows)

    def means(self, count: int) -> dict[str, Tensor]:
        """The sums over so many rows, divided by their number. Raises ValueError for what is not finite."""
        for name, total in self.sums.items():
            total /= count
            if not total.isfinite().all():
                raise ValueError(f"the inputs of {name} are not finite numbers in the first rows of the training text")
        return {name: self.sums[first] for name, first in self.first.items()}


def _linear(layer: nn.Module, weight: Tensor) -> nn.Linear:
    """A linear with this weight (out, in) where and as exact as the tensors of a layer are."""
    like: Any = next(layer.parameters())
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
    return linear
