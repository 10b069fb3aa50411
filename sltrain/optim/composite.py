"""Several optimizers, each over its own parameters, as one: one that takes matrices only, and the one that updates the
rest. Each parameter group carries the index of its optimizer under "member"."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from sltrain.optim.wrapper import WrappedOptimizer


class Composite(WrappedOptimizer):
    """The optimizers `members`, whose groups have "member" set to their index in that list."""

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
        """Of all members; a look-up in a ChainMap of torch's defaultdicts would add to the first of them."""
        return {parameter: kept for member in self.members for parameter, kept in member.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let each member update those of its parameters that have a gradient."""
        assert closure is None, "evaluate the loss before the step"
        for member in self.members:
            if member.param_groups:
                member.step()
