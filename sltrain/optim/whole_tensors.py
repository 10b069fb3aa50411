"""Optimizers that need whole tensors, on processes that hold shares of them.

A rule for whole matrices (muon, galore), for both factors of a layer (spectron), or for blocks of 256 elements
(adam8bit) is given them: every module has an owner, one of the processes, and its parameters' state lies there alone
(engine/owners.py). In a turn, each process has one module that it owns:

    each process sends its rows of weight and gradient to the owner          3 bytes travel for each byte of the weights
    the owner updates the whole weight, as one process would                 and one module is whole on its owner
    each process gets its rows of it back

So the state is divided among the processes as modules are, nearly evenly, and the numbers are those of one process. A
distributed Muon gathers its matrices too (Liu et al., arXiv 2502.16982, section 2.3). Parameters of element-wise
optimizers are updated where their rows are.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer

from sltrain.optim.wrapper import WrappedOptimizer


class WholeTensors(WrappedOptimizer):
    """Makes `inner`, over the shares and the whole tensors that this process updates, an optimizer of all.

    Args:
        inner: any optimizer of build.py.
        turns: gives those that the present gradients need, each a context in which some tensors that this process owns
            have their whole weight and gradient; the new weights are sent when it ends. All processes enter the same
            turns in the same order.
    """

    def __init__(self, inner: Optimizer, turns: Callable[[], Sequence[AbstractContextManager[None]]]) -> None:
        super().__init__(inner)
        self.turns = turns

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, shares first; the gradients are dropped."""
        assert closure is None, "evaluate the loss before the step"
        of_shares: AbstractContextManager[None] = contextlib.nullcontext()
        for turn in (of_shares, *self.turns()):
            with turn:
                self.inner.step()
            self.inner.zero_grad()
