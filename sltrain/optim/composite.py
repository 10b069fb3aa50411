"""Several optimizers, each over its own parameters, behind one face: one that takes matrices only, and the one that
updates the rest. Each parameter group carries the number of its optimizer under "member"."""

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from sltrain.optim.wrapper import WrappedOptimizer


class Composite(WrappedOptimizer):
    """The optimizers `members`, whose groups have "member" set to their places in that list."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        super().__init__(members[0])
        self.members = list(members)
        assert all(group["member"] == i for i, member in enumerate(members) for group in member.param_groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for number, member in enumerate(self.members):
            member.param_groups = [group for group in groups if group["member"] == number]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return ChainMap(*(member.state for member in self.members))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let each member update those of its parameters that have a gradient."""
        assert closure is None, "evaluate the loss before the step"
        for member in self.members:
            if member.param_groups:
                member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none)

    def close(self) -> None:
        for member in self.members:
            if isinstance(member, WrappedOptimizer):
                member.close()

    def state_dict(self) -> dict[str, Any]:
        """Refused: a state by index says nothing of whose it is; see named_state.py."""
        raise TypeError("the state of several optimizers is saved by name: optim/named_state.py")
