"""Forward passes of a model in shards, made by ranks that have different numbers of them to make.

A pass gathers weights from all ranks, so all must make one at the same time. Before each pass the ranks add up who
makes one and who was asked to stop; a rank that has none left makes passes of two tokens until nobody has any.

    with in_step:
        ...                 any number of passes of `module`, each after all ranks have agreed on it
        in_step.finish()    the other ranks' remaining ones
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sltrain.engine.distributed import Ranks


class Stopped(Exception):
    """A signal asked some rank to stop."""


class InStep:
    """See above. A pass raises Stopped, on all ranks, once `should_stop` is true on one of them.

    Args:
        module: what is called with ids (B, T) in each pass, under no_grad.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, should_stop: Callable[[], bool]) -> None:
        self.module, self.ranks, self.should_stop = module, ranks, should_stop
        self.is_inside = False  # a pass; after an error in one the other ranks wait for what does not come
        self._has_stopped = self._is_idle = False

    def __enter__(self) -> None:
        self._hooks = [
            self.module.register_forward_pre_hook(self._begin),
            self.module.register_forward_hook(self._end),
        ]

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def finish(self) -> None:
        """Make passes that do not count, until no rank has any to make or one was asked to stop."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.ranks.device)
        self._is_idle = True
        while not self._has_stopped and self._agree(0):
            self.module(ids)
        self._is_idle = False

    def _agree(self, own: int) -> int:
        """How many ranks make a pass."""
        num_passes, num_stopped = self.ranks.sum([own, int(self.should_stop())])
        self._has_stopped = num_stopped > 0
        return 0 if num_stopped else num_passes

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if not self._is_idle and not self._agree(1):
            raise Stopped
        self.is_inside = True

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.is_inside = False
