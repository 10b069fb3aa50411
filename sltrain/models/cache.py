"""Keys and values of the positions that a model has read, so that each new one is computed alone."""

import torch
from torch import Tensor, nn


class KeyValueCache:
    """What every attention layer remembers of one generation. `num_positions` were read before the current pass."""

    def __init__(self) -> None:
        self.num_positions = 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values (B, G, T, d) of a layer; return those of all positions, (B, G, past + T, d)."""
        if attention in self._kept:
            past_keys, past_values = self._kept[attention]
            keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
        self._kept[attention] = (keys, values)
        return keys, values
