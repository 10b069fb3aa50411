"""Dense training: every projection stays an nn.Linear. The baseline the other methods are measured against."""

from collections.abc import Callable

from torch import nn

from sltrain.methods.settings import MethodSettings


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Replace nothing. Raises ValueError if rank or sparsity overrides are set, which could have no effect."""
    settings.refuse_overrides("full", "rank_overrides", "sparsity_overrides")
    return []
