"""The key/value cache of generation: only new positions are computed."""

import torch
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of every attention layer, of the `num_positions` read before the current pass."""

    def __init__(self) -> None:
        self.num_positions = 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values (B, G, T, d); return those of all positions, (B, G, past + T, d)."""
        if attention in self._kept:
            past_keys, past_values = self._kept[attention]
            keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
        self._kept[attention] = (keys, values)
        return keys, values
