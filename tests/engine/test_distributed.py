"""What several processes of a run give each other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sltrain.engine.distributed import Ranks


def test_every_rank_begins_with_the_parameters_of_rank_0(on_two_ranks: Callable[..., list[Any]]) -> None:
    def begin(ranks: Ranks) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16())
        for parameter in model.parameters():
            nn.init.constant_(parameter, 1.5 + ranks.rank)
        ranks.send_from_main(model)
        return [parameter.detach() for parameter in model.parameters()]

    for parameters in on_two_ranks(begin):
        assert all((parameter == 1.5).all() for parameter in parameters)
