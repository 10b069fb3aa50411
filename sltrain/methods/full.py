"""Dense training: every projection stays an nn.Linear. The baseline the other methods are measured against."""

from collections.abc import Callable

from torch import nn

from sltrain.methods.settings import MethodSettings


def replace(model: nn.Module, settings: MethodSettings, should_replace: Callable[[str, nn.Linear], bool]) -> list[str]:
    """Replace nothing. Rank, sparsity and their overrides belong to the model's recipe and are not used."""
    return []
